use std::{fs, os::unix::fs::PermissionsExt as _};

use concord_common::{ErrorCode, wire::ReceiptSigner};

use super::*;

const NOW: Timestamp = Timestamp(1_700_000_000_000);

fn signer() -> ReceiptSigner {
    ReceiptSigner::from_pkcs8(&ReceiptSigner::generate_pkcs8().unwrap()).unwrap()
}

fn receipt(round: u32, outcome: Outcome) -> Receipt {
    Receipt {
        job: "job-1".parse().unwrap(),
        round: RoundNumber(round),
        silo: "clinic-a".parse().unwrap(),
        payload_digest: Digest::of(b"update"),
        outcome,
        recorded_at: Timestamp(1_700_000_000_123),
    }
}

fn kept(signer: &ReceiptSigner, round: u32) -> KeptReceipt {
    let signed = signer.sign(receipt(round, Outcome::Accepted));
    KeptReceipt::new(&signed, &signer.public_key(), NOW)
}

fn lines(folder: &Path) -> Vec<KeptReceipt> {
    fs::read_to_string(folder.join(FILE))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_kept_receipt_proves_with_the_servers_key_what_was_acknowledged() {
    let (folder, signer) = (tempfile::tempdir().unwrap(), signer());
    let receipts = Receipts::open(folder.path()).unwrap();
    let signed = signer.sign(receipt(3, Outcome::Discarded(ErrorCode::Late)));
    receipts
        .keep(KeptReceipt::new(&signed, &signer.public_key(), NOW))
        .unwrap();

    let line = lines(folder.path()).remove(0);
    assert_eq!(line.key_id, key_id(&signer.public_key()));
    assert_eq!(line.public_key, to_hex(&signer.public_key()));
    assert_eq!(line.receipt(), signed.receipt);
    line.verify().unwrap();
    for altered in [
        KeptReceipt {
            round: RoundNumber(4),
            ..line.clone()
        },
        KeptReceipt {
            outcome: Outcome::Accepted,
            ..line.clone()
        },
        KeptReceipt {
            recorded_at_ms: Timestamp(1_700_000_000_124),
            ..line.clone()
        },
        KeptReceipt {
            public_key: to_hex(&self::signer().public_key()),
            ..line.clone()
        },
        KeptReceipt {
            signature: "12".to_owned(),
            ..line.clone()
        },
        KeptReceipt {
            signature: "no hex".to_owned(),
            ..line.clone()
        },
    ] {
        assert_eq!(
            altered.verify(),
            Err(ReceiptError::Signature),
            "{altered:?}"
        );
    }
}

#[test]
fn receipts_stay_through_restarts_in_a_file_for_the_owner_only() {
    let (folder, signer) = (tempfile::tempdir().unwrap(), signer());
    for round in 1..=3 {
        let receipts = Receipts::open(folder.path()).unwrap();
        receipts.keep(kept(&signer, round)).unwrap();
        assert_eq!(receipts.last().unwrap().round, RoundNumber(round));
    }
    let receipts = Receipts::open(folder.path()).unwrap();
    assert_eq!(receipts.last(), Some(kept(&signer, 3)));
    let job = "job-1".parse().unwrap();
    assert!(receipts.has(&job, RoundNumber(3)) && !receipts.has(&job, RoundNumber(4)));
    assert_eq!(lines(folder.path()).len(), 3);
    let mode = fs::metadata(receipts.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn the_same_receipt_given_twice_is_kept_once_and_that_of_another_key_too() {
    let (folder, signer) = (tempfile::tempdir().unwrap(), signer());
    Receipts::open(folder.path())
        .unwrap()
        .keep(kept(&signer, 1))
        .unwrap();
    let receipts = Receipts::open(folder.path()).unwrap();
    receipts.keep(kept(&signer, 1)).unwrap();
    assert_eq!(lines(folder.path()).len(), 1);
    receipts.keep(kept(&self::signer(), 1)).unwrap();
    assert_eq!(lines(folder.path()).len(), 2);
}

#[test]
fn a_torn_last_line_is_cut_off_and_a_strange_one_left() {
    let (folder, signer) = (tempfile::tempdir().unwrap(), signer());
    let path = folder.path().join(FILE);
    Receipts::open(folder.path())
        .unwrap()
        .keep(kept(&signer, 1))
        .unwrap();
    let whole = fs::read_to_string(&path).unwrap() + "a note by hand\n";
    fs::write(&path, whole.clone() + &whole[..40]).unwrap();

    let receipts = Receipts::open(folder.path()).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    assert_eq!(receipts.last(), Some(kept(&signer, 1)));
    receipts.keep(kept(&signer, 2)).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let last: KeptReceipt = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    last.verify().unwrap();
    assert!(text.starts_with(&whole));
}

#[test]
fn a_receipt_that_the_disk_does_not_take_leaves_no_part_of_a_line() {
    let (folder, signer) = (tempfile::tempdir().unwrap(), signer());
    let receipts = Receipts::open(folder.path()).unwrap();
    receipts.keep(kept(&signer, 1)).unwrap();
    // A file that takes no writes stands for a full disk.
    let readable = File::open(receipts.path()).unwrap();
    let writable = std::mem::replace(&mut receipts.kept.lock().unwrap().file, readable);
    assert!(receipts.keep(kept(&signer, 2)).is_err());
    assert_eq!(receipts.last().unwrap().round, RoundNumber(1));
    receipts.kept.lock().unwrap().file = writable;
    receipts.keep(kept(&signer, 2)).unwrap();
    assert_eq!(lines(folder.path()).len(), 2);
}
