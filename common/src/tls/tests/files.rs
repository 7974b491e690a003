//! What is said about files that cannot be used.

use std::{
    fs::Permissions,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use super::{
    super::*,
    kit::{DAY, Federation, now},
};
use crate::{SpiffeId, Timestamp, fsutil::write_atomic, pki::WrittenCertificate};

/// A silo's certificate and key, and the CA's certificate, in a folder.
fn written(folder: &Path) -> (WrittenCertificate, PathBuf) {
    let north = Federation::new("north");
    let id = SpiffeId::new("north", Role::Silo, "clinic-a").unwrap();
    let issued = north.ca.issue(&id, &[], &[], now(), DAY).unwrap();
    let ca = north.ca.write(folder, true).unwrap();
    (issued.write(folder, true).unwrap(), ca.certificate)
}

fn refusal(certificate: &Path, key: &Path) -> String {
    Identity::load(certificate, key).unwrap_err().to_string()
}

#[test]
fn a_key_that_others_can_read_is_refused_with_the_cure() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = written(folder.path());
    for mode in [0o640, 0o604, 0o644] {
        std::fs::set_permissions(&files.key, Permissions::from_mode(mode)).unwrap();
        let error = refusal(&files.certificate, &files.key);
        assert!(
            error.contains(&format!("chmod 600 {}", files.key.display())),
            "{error}"
        );
        assert!(error.contains(&format!("{mode:04o}")), "{error}");
    }
    std::fs::set_permissions(&files.key, Permissions::from_mode(0o400)).unwrap();
    Identity::load(&files.certificate, &files.key).unwrap();
}

#[test]
fn the_group_may_read_a_key_among_the_services_credentials_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let credentials = folder.path().join("credentials");
    let (files, _) = written(&credentials);
    let load = |mode: u32, credentials: &Path| {
        std::fs::set_permissions(&files.key, Permissions::from_mode(mode)).unwrap();
        Identity::load_with(&files.certificate, &files.key, Some(credentials)).map(drop)
    };
    // newer versions of systemd: 0440, and an access control list for the service's user.
    load(0o440, &credentials).unwrap();
    load(0o400, &credentials).unwrap();
    for mode in [0o444, 0o460, 0o450, 0o404] {
        let error = load(mode, &credentials).unwrap_err();
        assert!(matches!(error, TlsError::KeyNotPrivate { .. }), "{error}");
    }
    for elsewhere in [folder.path().to_owned(), credentials.join("deeper")] {
        let error = load(0o440, &elsewhere).unwrap_err();
        assert!(matches!(error, TlsError::KeyNotPrivate { .. }), "{error}");
    }
}

#[test]
fn a_file_that_is_missing_or_something_else_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (files, ca) = written(folder.path());
    let missing = folder.path().join("missing.pem");
    assert!(refusal(&missing, &files.key).contains("missing.pem"));
    assert!(refusal(&files.certificate, &missing).contains("missing.pem"));

    // The two mixed up.
    let error = refusal(&files.key, &files.key);
    assert!(
        error.contains("silo-clinic-a.key holds no usable PEM certificate"),
        "{error}"
    );
    std::fs::set_permissions(&files.certificate, Permissions::from_mode(0o600)).unwrap();
    let error = refusal(&files.certificate, &files.certificate);
    assert!(
        error.contains("silo-clinic-a.crt holds no usable PEM private key"),
        "{error}"
    );

    // A CA's certificate speaks for nobody.
    let key = folder.path().join("ca.key");
    let error = refusal(&ca, &key);
    assert!(
        error.contains("ca.crt") && error.contains("SPIFFE"),
        "{error}"
    );

    std::fs::write(&missing, "nothing here").unwrap();
    let error = TrustRoots::load(&missing).unwrap_err().to_string();
    assert!(error.contains("missing.pem"), "{error}");
}

#[test]
fn a_key_of_another_certificate_is_refused_with_both_names() {
    let folder = tempfile::tempdir().unwrap();
    let (first, _) = written(&folder.path().join("first"));
    let (second, _) = written(&folder.path().join("second"));
    let error = refusal(&first.certificate, &second.key);
    assert!(
        error.contains("first/silo-clinic-a.crt") && error.contains("second/silo-clinic-a.key"),
        "{error}"
    );
}

#[test]
fn a_configuration_with_a_certificate_for_somebody_else_is_refused() {
    let north = Federation::new("north");
    let silo = north.identity(Role::Silo, "clinic-a");
    let server = north.identity(Role::Server, "main");
    let error = |result: Result<(), TlsError>| result.unwrap_err().to_string();

    let text = error(server_config(&silo, &north.roots(), "north").map(drop));
    assert!(
        text.contains("spiffe://north/silo/clinic-a") && text.contains("server"),
        "{text}"
    );
    let text = error(client_config(&server, &north.roots(), "north").map(drop));
    assert!(text.contains("silo or operator or worker"), "{text}");
    let text = error(client_config(&silo, &north.roots(), "south").map(drop));
    assert!(text.contains("`south`"), "{text}");
}

/// Issues a certificate to the same files as before.
fn issue_again(folder: &Path, north: &Federation, name: &str, not_before: Timestamp) -> TlsFiles {
    let id = SpiffeId::new("north", Role::Silo, name).unwrap();
    let issued = north.ca.issue(&id, &[], &[], not_before, DAY).unwrap();
    let [certificate, key, ca] = ["silo.crt", "silo.key", "ca.crt"].map(|file| folder.join(file));
    write_atomic(&certificate, issued.certificate_pem.as_bytes(), 0o644).unwrap();
    write_atomic(&key, issued.key_pem.as_bytes(), 0o600).unwrap();
    write_atomic(&ca, north.ca.certificate_pem().as_bytes(), 0o644).unwrap();
    TlsFiles {
        certificate,
        key,
        ca,
    }
}

#[test]
fn a_reload_publishes_new_certificates_and_only_good_ones() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let north = Federation::new("north");
    let files = issue_again(folder, &north, "clinic-a", now() - DAY / 2);
    let tls = TlsReload::client(files, "north", now()).unwrap();
    let mut receiver = tls.subscribe();
    receiver.mark_unchanged();

    issue_again(folder, &north, "clinic-b", now());
    let error = tls.reload(now()).unwrap_err().to_string();
    assert!(
        error.contains("runs as spiffe://north/silo/clinic-a"),
        "{error}"
    );

    issue_again(folder, &north, "clinic-a", now() - DAY * 3);
    let error = tls.reload(now()).unwrap_err().to_string();
    assert!(
        error.contains("silo.crt") && error.contains("have a new one issued"),
        "{error}"
    );

    issue_again(folder, &north, "clinic-a", now());
    write_atomic(
        &folder.join("ca.crt"),
        Federation::new("north").ca.certificate_pem().as_bytes(),
        0o644,
    )
    .unwrap();
    let error = tls.reload(now()).unwrap_err().to_string();
    assert!(
        error.contains("not signed by the CA in") && error.contains("ca.crt"),
        "{error}"
    );
    assert!(!receiver.has_changed().unwrap());

    issue_again(folder, &north, "clinic-a", now());
    let renewed = tls.reload(now()).unwrap();
    assert!(renewed.not_after > tls.peer().not_after);
    assert!(receiver.has_changed().unwrap());
}

#[test]
fn a_server_does_not_start_with_a_certificate_that_nobody_accepts() {
    let folder = tempfile::tempdir().unwrap();
    let north = Federation::new("north");
    let id = SpiffeId::new("north", Role::Server, "main").unwrap();
    let start = |not_before: Timestamp| {
        let issued = north.ca.issue(&id, &[], &[], not_before, DAY).unwrap();
        let written = issued.write(folder.path(), true).unwrap();
        let ca = north.ca.write(folder.path(), true).unwrap().certificate;
        let files = TlsFiles {
            certificate: written.certificate,
            key: written.key,
            ca,
        };
        TlsReload::server(files, "north", now())
    };
    start(now()).unwrap();
    let error = start(now() - DAY * 2).unwrap_err().to_string();
    assert!(error.contains("have a new one issued"), "{error}");
    let error = start(now() + DAY).unwrap_err().to_string();
    assert!(error.contains("not valid yet"), "{error}");
}

#[test]
fn a_client_starts_with_an_expired_certificate_and_can_be_given_a_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let north = Federation::new("north");
    let files = issue_again(folder.path(), &north, "clinic-a", now() - DAY * 3);
    let tls = TlsReload::client(files, "north", now()).unwrap();
    issue_again(folder.path(), &north, "clinic-a", now());
    tls.reload(now()).unwrap();
}

#[test]
fn an_endpoint_that_is_none_is_refused_with_the_form_to_use() {
    let north = Federation::new("north");
    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    for url in [
        "http://localhost:1",
        "localhost:1",
        "https://localhost",
        "https://localhost:0",
        "https://somebody@localhost:1",
        "https://localhost:1/path",
        "https://localhost:1/?a=b",
        "https://bad_host!:1",
        "",
    ] {
        let error = connect_channel(url, Arc::clone(&client), ChannelOptions::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("`{url}`")), "{error}");
    }
}
