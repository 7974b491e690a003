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
use crate::{SpiffeId, pki::WrittenCertificate};

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

#[test]
fn an_endpoint_that_is_none_is_refused_with_the_form_to_use() {
    let north = Federation::new("north");
    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    for url in [
        "http://localhost:1",
        "localhost:1",
        "https://localhost",
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
