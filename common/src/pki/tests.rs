use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::{
    Role,
    tls::{Identity, TlsFiles},
};

const START: Timestamp = Timestamp(1_700_000_000_000);

fn silo(name: &str) -> SpiffeId {
    SpiffeId::new("north", Role::Silo, name).unwrap()
}

#[test]
fn a_ca_names_its_federation_and_signs_only_leaves() {
    let ca = CertificateAuthority::create("north", START, 10).unwrap();
    let facts = inspect(ca.certificate_pem().as_bytes()).unwrap();
    assert!(facts.is_ca);
    assert_eq!(facts.uris, ["spiffe://north"]);
    assert_eq!(facts.not_before, START);
    assert_eq!(facts.not_after, START + DAY * 10);
    assert!(
        facts.subject.contains("Concord CA north"),
        "{}",
        facts.subject
    );
}

#[test]
fn two_cas_of_one_federation_have_names_of_their_own() {
    let subject = || {
        let ca = CertificateAuthority::create("north", START, 10).unwrap();
        inspect(ca.certificate_pem().as_bytes()).unwrap().subject
    };
    assert_ne!(subject(), subject());
}

#[test]
fn a_certificate_fits_the_role_it_is_for() {
    let ca = CertificateAuthority::create("north", START, 10).unwrap();
    for role in [Role::Server, Role::Silo, Role::Operator, Role::Worker] {
        let id = SpiffeId::new("north", role, "a").unwrap();
        let issued = ca
            .issue(
                &id,
                &["a.example".to_owned()],
                &[[127, 0, 0, 1].into()],
                START,
                DAY,
            )
            .unwrap();
        let facts = inspect(issued.certificate_pem.as_bytes()).unwrap();
        assert_eq!(facts.uris, [id.to_string()]);
        assert_eq!(facts.dns_names, ["a.example"]);
        assert_eq!(facts.server_auth, role == Role::Server, "{role}");
        assert_eq!(facts.client_auth, role != Role::Server, "{role}");
        assert!(!facts.is_ca);
        assert_eq!((facts.not_before, facts.not_after), (START, START + DAY));
        assert!(facts.to_string().contains(&id.to_string()));
    }
}

#[test]
fn a_certificate_of_another_federation_or_beyond_its_ca_is_refused() {
    let ca = CertificateAuthority::create("north", START, 10).unwrap();
    let south = SpiffeId::new("south", Role::Silo, "a").unwrap();
    let error = ca.issue(&south, &[], &[], START, DAY).unwrap_err();
    assert!(matches!(error, PkiError::OtherFederation { .. }), "{error}");
    let error = ca.issue(&silo("a"), &[], &[], START, DAY * 11).unwrap_err();
    assert!(matches!(error, PkiError::OutlivesCa { .. }), "{error}");
}

#[test]
fn a_federation_with_an_impossible_name_is_refused() {
    let error = CertificateAuthority::create("No/rth", START, 10).unwrap_err();
    assert!(error.to_string().contains("No/rth"), "{error}");
}

#[test]
fn a_dns_name_beyond_ascii_is_refused() {
    let ca = CertificateAuthority::create("north", START, 10).unwrap();
    let names = ["käse.example".to_owned()];
    assert!(ca.issue(&silo("a"), &names, &[], START, DAY).is_err());
}

#[test]
fn files_are_private_load_again_and_go_on_issuing() {
    let folder = tempfile::tempdir().unwrap();
    let pki = folder.path().join("pki");
    let made = CertificateAuthority::create("north", START, 10).unwrap();
    let written = made.write(&pki, false).unwrap();
    assert_eq!(written.key, pki.join("ca.key"));
    let mode =
        |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&pki), 0o700);
    assert_eq!(mode(&written.key), 0o600);

    let loaded = CertificateAuthority::load(&pki).unwrap();
    assert_eq!(loaded.federation(), "north");
    assert_eq!(loaded.not_after(), made.not_after());
    let issued = loaded.issue(&silo("a"), &[], &[], START, DAY).unwrap();
    let leaf = issued.write(&pki, false).unwrap();
    assert_eq!(leaf.certificate, pki.join("silo-a.crt"));
    assert_eq!(mode(&leaf.key), 0o600);

    let files = TlsFiles {
        certificate: leaf.certificate,
        key: leaf.key,
        ca: pki.join(CA_CERTIFICATE),
    };
    let (identity, _roots) = files.load().unwrap();
    assert_eq!(identity.id(), &silo("a"));
    assert_eq!(identity.not_after(), START + DAY);
}

#[test]
fn nothing_is_overwritten_unless_it_is_forced() {
    let folder = tempfile::tempdir().unwrap();
    let first = CertificateAuthority::create("north", START, 10).unwrap();
    first.write(folder.path(), false).unwrap();
    let second = CertificateAuthority::create("north", START, 10).unwrap();
    let error = second.write(folder.path(), false).unwrap_err().to_string();
    assert!(
        error.contains("ca.crt") && error.contains("--force"),
        "{error}"
    );
    let kept = std::fs::read_to_string(folder.path().join("ca.crt")).unwrap();
    assert_eq!(kept, first.certificate_pem());

    // One file of the two is enough to stop it.
    std::fs::remove_file(folder.path().join("ca.crt")).unwrap();
    let error = second.write(folder.path(), false).unwrap_err().to_string();
    assert!(error.contains("ca.key"), "{error}");

    second.write(folder.path(), true).unwrap();
    let now = std::fs::read_to_string(folder.path().join("ca.crt")).unwrap();
    assert_eq!(now, second.certificate_pem());

    let issued = second.issue(&silo("a"), &[], &[], START, DAY).unwrap();
    issued.write(folder.path(), false).unwrap();
    let error = issued.write(folder.path(), false).unwrap_err();
    assert!(matches!(error, PkiError::Exists { .. }), "{error}");
}

#[test]
fn a_folder_that_holds_no_ca_is_refused_by_file() {
    let folder = tempfile::tempdir().unwrap();
    let load = || {
        CertificateAuthority::load(folder.path())
            .unwrap_err()
            .to_string()
    };
    assert!(load().contains("ca.crt"), "{}", load());

    let ca = CertificateAuthority::create("north", START, 10).unwrap();
    let written = ca.write(folder.path(), false).unwrap();
    let leaf = ca.issue(&silo("a"), &[], &[], START, DAY).unwrap();
    std::fs::write(&written.certificate, &leaf.certificate_pem).unwrap();
    assert!(load().contains("no CA's certificate"), "{}", load());

    std::fs::write(&written.certificate, ca.certificate_pem()).unwrap();
    std::fs::write(&written.key, &leaf.key_pem).unwrap();
    assert!(load().contains("is not the key of"), "{}", load());

    std::fs::write(&written.key, "nonsense").unwrap();
    assert!(load().contains("ca.key"), "{}", load());
}

#[test]
fn a_cas_key_that_others_can_read_is_refused_with_the_cure() {
    let folder = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::create("north", START, 10).unwrap();
    let key = ca.write(folder.path(), false).unwrap().key;
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = CertificateAuthority::load(folder.path())
        .unwrap_err()
        .to_string();
    let cure = format!("(mode 0640); make it private: chmod 600 {}", key.display());
    assert!(error.contains(&cure), "{error}");
}

#[test]
fn a_key_never_shows_in_debug_output() {
    let ca = CertificateAuthority::create("north", START, 10).unwrap();
    let issued = ca.issue(&silo("a"), &[], &[], START, DAY).unwrap();
    for text in [format!("{ca:?}"), format!("{issued:?}")] {
        assert!(!text.contains("PRIVATE"), "{text}");
    }
}

#[test]
fn an_identity_in_memory_is_the_one_on_disk() {
    let ca = CertificateAuthority::create("north", START, 10).unwrap();
    let issued = ca.issue(&silo("a"), &[], &[], START, DAY).unwrap();
    let identity =
        Identity::from_pem(issued.certificate_pem.as_bytes(), issued.key_pem.as_bytes()).unwrap();
    let facts = inspect(issued.certificate_pem.as_bytes()).unwrap();
    assert_eq!(identity.peer().serial, facts.serial);
}
