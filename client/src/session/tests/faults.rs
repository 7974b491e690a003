//! Faults of this machine that may pass, and those that do not.

use std::io;

use concord_learning::{
    LearningError,
    cache::{CacheSettings, DiskBudget},
};

use super::{
    super::error::{SessionError, may_pass},
    *,
};
use crate::{testing::Deed, vault::VaultError};

/// Puts a folder where the vault's file should go, so that it can be neither read nor replaced: a disk with a fault.
fn block(file: &Path) {
    fs::create_dir_all(file).unwrap();
}

fn unblock(file: &Path) {
    fs::remove_dir_all(file.parent().unwrap()).unwrap();
}

#[tokio::test]
async fn a_vault_that_cannot_be_written_declines_nothing_and_the_next_try_gives_the_same_bytes() {
    let spec_toml = spec("fedmcp", 2, "");
    let pair = Pair::new(&spec_toml);
    let server = pair.faulty();
    let file = pair.north.vault().file(&job(), Record::State);
    let blocked = file.clone();
    // Between training and the saving of the vault.
    server.plan(
        Call::Report,
        Fault::First(Deed::new(move || block(&blocked))),
    );
    let north = pair.north_on(&server);
    let error = north.round(&job(), ONE).await.unwrap_err();
    assert!(
        matches!(error, SessionError::Vault(VaultError::Io { .. })) && !error.is_lasting(),
        "{error}"
    );
    assert!(!pair.notice(&pair.north).await.answered);
    let log = pair.north.egress_log();
    assert!(log.iter().all(|line| line["kind"] != "decline"), "{log:?}");

    unblock(&file);
    accepted(north.round(&job(), ONE).await.unwrap());
    accepted(
        pair.south
            .join(&pair.federation)
            .round(&job(), ONE)
            .await
            .unwrap(),
    );
    assert_eq!(
        pair.federation.versions(),
        undisturbed(&spec_toml).await[..2]
    );
}

#[tokio::test]
async fn a_vault_that_cannot_be_read_declines_nothing() {
    let pair = Pair::new(&spec("fedmcp", 1, ""));
    let file = pair.north.vault().file(&job(), Record::State);
    block(&file);
    let north = pair.north.join(&pair.federation);
    let error = north.round(&job(), ONE).await.unwrap_err();
    assert!(!error.is_lasting(), "{error}");
    unblock(&file);
    accepted(north.round(&job(), ONE).await.unwrap());
}

#[tokio::test]
async fn a_cache_folder_that_is_gone_costs_no_round() {
    let mut pair = Pair::new(&spec("fedmcp", 1, ""));
    pair.north.profile.cache = CacheSettings {
        memory_bytes: 0,
        disk: Some(DiskBudget {
            folder: pair.north.folder.path().join("gone"),
            bytes: 1 << 20,
        }),
        ..CacheSettings::default()
    };
    let north = pair.north.join(&pair.federation);
    accepted(north.round(&job(), ONE).await.unwrap());
}

#[test]
fn only_faults_that_would_come_again_are_lasting() {
    let full = || io::Error::from_raw_os_error(28);
    let file = PathBuf::from("state.vault");
    for passing in [
        SessionError::Vault(VaultError::Io {
            path: file.clone(),
            source: full(),
        }),
        SessionError::Learning(LearningError::io("tokenizer.json", full())),
        SessionError::Learning(LearningError::Stopped("train")),
        SessionError::Receipts {
            path: file.clone(),
            source: full(),
        },
        SessionError::Worker("gone".to_owned()),
        SessionError::Call(CallError::Protocol("odd".to_owned())),
        SessionError::Call(CallError::Refused(Refusal::new(ErrorCode::Truncated, ""))),
    ] {
        assert!(!passing.is_lasting(), "{passing}");
    }
    for lasting in [
        SessionError::Vault(VaultError::Altered { file }),
        SessionError::Learning(LearningError::Training("not finite".to_owned())),
        SessionError::Learning(LearningError::State("of another job".to_owned())),
        SessionError::Call(CallError::Refused(Refusal::new(ErrorCode::NotFinite, ""))),
    ] {
        assert!(lasting.is_lasting(), "{lasting}");
    }
    assert!(may_pass(&full()) && may_pass(&io::Error::from_raw_os_error(5)));
    assert!(!may_pass(&io::Error::from(io::ErrorKind::NotFound)));
}
