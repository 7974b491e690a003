//! Jobs that a silo says no to.

use super::*;
use crate::testing::tiny_backbone;

#[tokio::test]
async fn a_job_that_the_silo_cannot_do_is_declined_with_a_code() {
    let digest = format!("digest = \"{}\"", Digest::of(b"other weights"));
    for (from, to, code) in [
        (
            "name = \"tiny\"",
            "name = \"huge\"",
            ErrorCode::UnknownBackbone,
        ),
        ("task = \"toy\"", "task = \"other\"", ErrorCode::UnknownTask),
        ("hidden = 24", "hidden = 48", ErrorCode::BackboneMismatch),
        ("layers = 2", digest.as_str(), ErrorCode::BackboneMismatch),
        (
            "name = \"fedmcp\"",
            "name = \"local\"",
            ErrorCode::PolicyRefused,
        ),
        (
            "max_length = 24",
            "max_length = 4000",
            ErrorCode::SiloFailed,
        ),
    ] {
        let to = if to == digest {
            format!("layers = 2\n{digest}")
        } else {
            to.to_owned()
        };
        let pair = Pair::new(&spec("fedmcp", 1, "").replace(from, &to));
        let refusal = declined(pair.north.join(&pair.federation).round(&job(), ONE).await);
        assert_eq!(refusal.code, code, "{refusal}");
        assert!(!refusal.message.contains('/'), "no paths: {refusal}");
        assert!(pair.notice(&pair.north).await.answered || pair.federation.outcome().0.is_over());
        let log = pair.north.egress_log();
        assert_eq!(log.last().unwrap()["code"], code.as_str());
    }
}

#[tokio::test]
async fn data_that_cannot_be_used_is_declined_without_a_word_about_it() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let file = pair.north.folder.path().join("data/validation.csv");
    fs::write(file, "text,label\nsome rain,canary-label\n").unwrap();
    let refusal = declined(pair.north.join(&pair.federation).round(&job(), ONE).await);
    assert_eq!(refusal.code, ErrorCode::BadData);
    assert!(!refusal.message.contains("canary"), "{refusal}");
}

#[tokio::test]
async fn a_job_whose_backbones_tokenizer_cannot_be_read_is_declined() {
    let mut pair = Pair::new(&spec("fedmcp", 1, ""));
    let backbone = pair.north.folder.path().join("backbone");
    fs::create_dir(&backbone).unwrap();
    let source = tiny_backbone().join("0_Transformer");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(source.join(file), backbone.join(file)).unwrap();
    }
    pair.north.profile.backbones[0].path.clone_from(&backbone);
    let north = pair.north.join(&pair.federation);
    // Loaded for an earlier job; the tokenizer has gone since.
    north.bench.backbone(&backbone).await.unwrap();
    fs::remove_file(backbone.join("tokenizer.json")).unwrap();
    let refusal = declined(north.round(&job(), ONE).await);
    assert_eq!(refusal.code, ErrorCode::BackboneMismatch);
    assert!(!refusal.message.contains('/'), "no paths: {refusal}");
}

#[tokio::test]
async fn a_torn_vault_is_declined_and_left_as_it_is() {
    let pair = Pair::new(&spec("fedmcp", 2, ""));
    accepted(
        pair.north
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    accepted(
        pair.south
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    let file = pair.north.vault().file(&job(), Record::State);
    let torn = fs::read(&file).unwrap()[..100].to_vec();
    fs::write(&file, &torn).unwrap();
    let refusal = declined(
        pair.north
            .join(&pair.federation)
            .round(&job(), RoundNumber(2))
            .await,
    );
    assert_eq!(refusal.code, ErrorCode::SiloFailed);
    assert_eq!(fs::read(&file).unwrap(), torn);
}

#[tokio::test]
async fn an_update_beyond_the_silos_own_bound_is_held_back_and_the_job_declined() {
    let pair = Pair::new(&spec("fedmcp", 1, "[limits]\nmax_update_norm = 1e-9"));
    let refusal = declined(pair.north.join(&pair.federation).round(&job(), ONE).await);
    assert_eq!(refusal.code, ErrorCode::SiloFailed);
    assert!(refusal.message.contains("NORM_TOO_LARGE"), "{refusal}");
    let log = pair.north.egress_log();
    assert!(
        log.iter().all(|line| line["kind"] != "contribution"),
        "{log:?}"
    );
}

#[tokio::test]
async fn an_update_that_the_server_refuses_for_what_it_is_ends_the_silos_part_in_the_job() {
    for (call, code) in [
        (Call::Begin, ErrorCode::BadWeight),
        (Call::Upload, ErrorCode::NotFinite),
        (Call::Upload, ErrorCode::NormTooLarge),
    ] {
        let pair = Pair::new(&spec("fedmcp", 1, ""));
        let server = pair.faulty();
        server.plan(call, Fault::Refused(code));
        let north = pair.north_on(&server);
        let refusal = declined(north.round(&job(), ONE).await);
        assert_eq!(refusal.code, ErrorCode::SiloFailed);
        assert!(refusal.message.contains(code.as_str()), "{refusal}");
        assert_eq!(server.left(), 0);
        assert!(pair.notice(&pair.north).await.answered);
        let outbox = fs::read_dir(pair.north.folder.path().join("outbox")).unwrap();
        assert_eq!(outbox.count(), 0, "nothing is left to send again");
    }
}

#[tokio::test]
async fn an_update_that_does_not_arrive_whole_is_no_reason_to_decline() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let server = pair.faulty();
    for _ in 0..6 {
        server.plan(Call::Upload, Fault::Refused(ErrorCode::Truncated));
    }
    let north = pair.north_on(&server);
    let error = north.round(&job(), ONE).await.unwrap_err();
    assert!(!error.is_lasting(), "{error}");
    accepted(north.round(&job(), ONE).await.unwrap());
}

#[tokio::test]
async fn a_declined_job_keeps_nothing_in_memory() {
    let pair = Pair::new(&spec("fedmcp", 2, ""));
    let north = pair.north.join(&pair.federation);
    accepted(north.round(&job(), ONE).await.unwrap());
    let key = north.key(&job());
    assert_eq!(north.bench.last_round(&key).await.unwrap(), Some(1));
    accepted(
        pair.south
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    fs::write(pair.north.vault().file(&job(), Record::State), b"torn").unwrap();
    declined(north.round(&job(), RoundNumber(2)).await);
    assert_eq!(north.bench.last_round(&key).await.unwrap(), None);
}
