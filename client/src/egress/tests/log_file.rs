//! The log's file: torn lines, strange lines, a disk that is full.

use std::collections::HashMap;

use super::*;
use crate::egress::log::Store;

#[test]
fn a_torn_last_line_is_cut_off_and_a_strange_line_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("egress.jsonl");
    let first = gate(folder.path(), NO_LIMITS);
    let cleared = first.pass(&assignment(), update(2), 10).unwrap();
    first.depart(&cleared, 0).unwrap();
    let whole = fs::read(&path).unwrap();
    // Stopped in the middle; after a power cut, the length is there and some of the bytes are not.
    let mut zeros = vec![0; 20];
    zeros.push(b'\n');
    for torn in [&whole[..20], &[0; 50], &zeros] {
        fs::write(&path, [&whole[..], torn].concat()).unwrap();
        gate(folder.path(), NO_LIMITS).depart(&cleared, 0).unwrap();
        assert_eq!(log_lines(folder.path()).len(), 2);
    }
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        match EgressLog::open(&path).unwrap_err() {
            EgressError::Log { line, .. } => line,
            error => panic!("{error}"),
        }
    };
    assert_eq!(refused(&[b"hello\n", &whole[..]].concat()), 1);
    assert_eq!(
        refused(&[&whole[..], b"{\"kind\":\"other\"}\n"].concat()),
        2,
        "whole, so it may have left"
    );
}

/// A file on a disk with so much room.
#[derive(Debug)]
struct SmallDisk {
    bytes: Vec<u8>,
    room: usize,
    can_cut: bool,
}

impl Store for SmallDisk {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let fits = bytes.len().min(self.room - self.bytes.len());
        self.bytes.extend_from_slice(&bytes[..fits]);
        if fits < bytes.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        if !self.can_cut {
            return Err(io::Error::other("the disk is gone"));
        }
        self.bytes.truncate(length as usize);
        Ok(())
    }
}

fn claim_entry(round: u32) -> Entry {
    Entry {
        time: "2023-11-14T22:13:20Z".to_owned(),
        server: "test".to_owned(),
        job: "job-1".parse().unwrap(),
        what: What::Claim {
            round: RoundNumber(round),
        },
    }
}

fn log_on_a_disk_that_fills_up(can_cut: bool) -> EgressLog<SmallDisk> {
    let disk = SmallDisk {
        bytes: Vec::new(),
        room: 200,
        can_cut,
    };
    let mut log = EgressLog::over(Path::new("egress.jsonl"), disk, 0, HashMap::new());
    log.write(&claim_entry(1)).unwrap();
    let full = loop {
        if let Err(error) = log.write(&claim_entry(2)) {
            break error;
        }
    };
    assert!(
        matches!(
            &full,
            EgressError::Io {
                kind: io::ErrorKind::StorageFull,
                ..
            }
        ),
        "{full}"
    );
    log
}

#[test]
fn a_full_disk_leaves_no_torn_line_and_the_log_goes_on_when_there_is_room() {
    let mut log = log_on_a_disk_that_fills_up(true);
    assert!(log.write(&claim_entry(2)).is_err(), "it is still full");
    log.store_mut().room = 10_000;
    log.write(&claim_entry(3)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("egress.jsonl");
    fs::write(&path, &log.store_mut().bytes).unwrap();
    EgressLog::open(&path).unwrap();
    let rounds: Vec<_> = log_lines(folder.path())
        .iter()
        .map(|line| line["round"].as_u64().unwrap())
        .collect();
    assert_eq!((rounds[0], *rounds.last().unwrap()), (1, 3));
}

#[test]
fn a_log_that_cannot_be_mended_takes_nothing_more_until_it_is_opened_anew() {
    let mut log = log_on_a_disk_that_fills_up(false);
    log.store_mut().room = 10_000;
    assert!(matches!(
        log.write(&claim_entry(3)).unwrap_err(),
        EgressError::Broken { .. }
    ));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("egress.jsonl");
    fs::write(&path, &log.store_mut().bytes).unwrap();
    EgressLog::open(&path)
        .unwrap()
        .write(&claim_entry(3))
        .unwrap();
    assert_eq!(log_lines(folder.path()).last().unwrap()["round"], 3);
}
