//! Handshakes over loopback: who gets in, who does not, and what each side is told.

mod files;
mod kit;
mod limits;

use std::sync::Arc;

use rcgen::ExtendedKeyUsagePurpose;
use rustls::{ClientConfig, ServerConfig, sign::SingleCertAndKey};

use self::kit::{DAY, Federation, Running, call, now};
use super::*;
use crate::{
    Timestamp,
    pki::{
        CertificateAuthority,
        forge::{forge, impostor},
    },
};

/// A client configuration without the checks that [`client_config`] makes on one's own certificate.
fn unchecked_client(
    roots: &TrustRoots,
    federation: &str,
    identity: Option<&Identity>,
) -> Arc<ClientConfig> {
    let provider = provider();
    let verifier = verify::ServerVerifier::new(roots, federation, &provider);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        Some(identity) => builder
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key()))),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

/// A server configuration without the checks that [`server_config`] makes on one's own certificate.
fn unchecked_server(
    roots: &TrustRoots,
    federation: &str,
    identity: &Identity,
) -> Arc<ServerConfig> {
    let provider = provider();
    let verifier = verify::ClientVerifier::new(roots, federation, &provider).unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

/// The server refuses the client: the client is told `sentence`, the server logs and counts `reason`.
async fn assert_server_refuses(
    server: &Running,
    client: Arc<ClientConfig>,
    sentence: &str,
    reason: &str,
) {
    let status = call(&server.channel(client)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}");
    let told = explain_tls_error(&status).unwrap_or_else(|| panic!("{status:?}"));
    assert!(told.contains(sentence), "{told}");
    server.wait_for_refusals(reason, 1).await;
    assert_eq!(server.connections(), 0);
}

/// The client refuses the server, and says `sentence`.
async fn assert_client_refuses(server: &Running, client: Arc<ClientConfig>, sentence: &str) {
    let status = call(&server.channel(client)).await.unwrap_err();
    let told = explain_tls_error(&status).unwrap_or_else(|| panic!("{status:?}"));
    assert!(told.contains(sentence), "{told}");
    server.wait_for_refusals("refused_by_client", 1).await;
}

#[tokio::test]
async fn a_silo_with_a_good_certificate_gets_in_and_is_known_by_name() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let identity = north.identity(Role::Silo, "clinic-a");
    let channel = server.channel(north.client(&identity));
    call(&channel).await.unwrap();
    call(&channel).await.unwrap();
    assert_eq!(server.connections(), 1);
    assert_eq!(server.callers(), vec![identity.peer().clone(); 2]);
    assert!(server.metrics().contains("concord_tls_connections_open 1"));
    drop(channel);
    server.wait_for("concord_tls_connections_open 0").await;
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let client = unchecked_client(&north.roots(), "north", None);
    assert_server_refuses(
        &server,
        client,
        "wants a client certificate",
        "no_certificate",
    )
    .await;
}

#[tokio::test]
async fn a_client_of_another_ca_is_refused() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let identity = Federation::new("north").identity(Role::Silo, "clinic-a");
    let client = unchecked_client(&north.roots(), "north", Some(&identity));
    assert_server_refuses(&server, client, "does not know the CA", "unknown_ca").await;
}

#[tokio::test]
async fn a_client_of_a_ca_with_the_same_name_and_another_key_is_refused() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let identity = Federation::from(impostor(&north.ca)).identity(Role::Silo, "clinic-a");
    let client = unchecked_client(&north.roots(), "north", Some(&identity));
    assert_server_refuses(&server, client, "does not know the CA", "unknown_ca").await;
}

#[tokio::test]
async fn a_client_with_an_expired_certificate_is_refused() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let identity = north.identity_at(Role::Silo, "clinic-a", now() - DAY * 2, DAY);
    let client = north.client(&identity);
    assert_server_refuses(&server, client, "it has expired", "expired").await;
}

#[tokio::test]
async fn a_client_with_a_certificate_of_tomorrow_is_refused() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let identity = north.identity_at(Role::Silo, "clinic-a", now() + DAY, DAY);
    let client = north.client(&identity);
    assert_server_refuses(&server, client, "not valid yet", "expired").await;
}

#[tokio::test]
async fn a_client_of_another_federation_is_refused_even_if_its_ca_is_trusted() {
    let north = Federation::new("north");
    let south = Federation::new("south");
    let server = Running::start_with(
        server_config(
            &north.identity(Role::Server, "main"),
            &north.roots_with(&south),
            "north",
        )
        .unwrap(),
        AcceptorLimits::default(),
    );
    let identity = south.identity(Role::Silo, "clinic-a");
    let client = unchecked_client(&north.roots(), "north", Some(&identity));
    assert_server_refuses(&server, client, "another federation", "wrong_federation").await;
}

#[tokio::test]
async fn a_servers_certificate_lets_nobody_in_as_a_client() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let identity = north.identity(Role::Server, "main");
    let client = unchecked_client(&north.roots(), "north", Some(&identity));
    assert_server_refuses(&server, client, "it is not for clients", "bad_identity").await;
}

#[tokio::test]
async fn a_client_whose_certificate_names_two_identities_or_none_is_refused() {
    let north = Federation::new("north");
    let id = crate::SpiffeId::new("north", Role::Silo, "clinic-a").unwrap();
    let uri = |text: &str| rcgen::SanType::URI(text.try_into().unwrap());
    for names in [
        vec![uri("spiffe://north/silo/a"), uri("spiffe://north/silo/b")],
        vec![uri("https://north/silo/a")],
        vec![rcgen::SanType::DnsName("a.example".try_into().unwrap())],
    ] {
        let server = Running::start(&north);
        // The identity that the test loads has a name; the chain it presents does not.
        let forged = forge(&north.ca, &id, |params| params.subject_alt_names = names);
        let client = kit::raw_client(&north.roots(), "north", &forged);
        assert_server_refuses(&server, client, "does not name", "bad_identity").await;
    }
}

#[tokio::test]
async fn a_service_refuses_a_caller_of_another_role_by_code() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let operator = north.identity(Role::Operator, "ann");
    let status = call(&server.channel(north.client(&operator)))
        .await
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
    let refusal = Refusal::from_status(&status).unwrap();
    assert_eq!(refusal.code, ErrorCode::WrongRole);
    assert!(
        refusal.message.contains("silo") && refusal.message.contains("spiffe://north/operator/ann"),
        "{refusal}"
    );
    assert_eq!(explain_tls_error(&status), None);
    assert_eq!(server.callers(), []);
}

#[test]
fn a_request_that_came_through_no_acceptor_has_no_role() {
    let request = tonic::Request::new(());
    let refusal = require_role(&request, Role::Silo).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::Internal);
}

#[test]
fn a_service_can_be_open_to_several_roles() {
    let mut request = tonic::Request::new(());
    request.extensions_mut().insert(ConnectionInfo {
        remote: ([127, 0, 0, 1], 1).into(),
        peer: PeerIdentity {
            id: crate::SpiffeId::new("north", Role::Worker, "w").unwrap(),
            serial: "01".to_owned(),
            not_after: Timestamp(0),
        },
    });
    assert!(require_one_role_of(&request, &[Role::Operator, Role::Worker]).is_ok());
    let refusal = require_one_role_of(&request, &[Role::Operator, Role::Silo]).unwrap_err();
    assert!(refusal.message.contains("operator or silo"), "{refusal}");
}

#[tokio::test]
async fn a_client_refuses_a_server_of_another_ca_and_names_its_ca_file() {
    let north = Federation::new("north");
    let other = Federation::new("north");
    let server = Running::start(&other);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.crt");
    std::fs::write(&file, north.ca.certificate_pem()).unwrap();
    let identity = north.identity(Role::Silo, "clinic-a");
    let client = client_config(&identity, &TrustRoots::load(&file).unwrap(), "north").unwrap();
    let sentence = format!("not signed by the CA in {}", file.display());
    assert_client_refuses(&server, client, &sentence).await;
}

#[tokio::test]
async fn a_client_refuses_a_server_of_another_federation() {
    let (north, south) = (Federation::new("north"), Federation::new("south"));
    let server = Running::start(&south);
    let identity = north.identity(Role::Silo, "clinic-a");
    let client = client_config(&identity, &north.roots_with(&south), "north").unwrap();
    assert_client_refuses(&server, client, "spiffe://south/server/main").await;
}

#[tokio::test]
async fn a_client_refuses_a_server_whose_certificate_has_expired() {
    let north = Federation::new("north");
    let identity = north.identity_at(Role::Server, "main", now() - DAY * 2, DAY);
    let config = server_config(&identity, &north.roots(), "north").unwrap();
    let server = Running::start_with(config, AcceptorLimits::default());
    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    assert_client_refuses(&server, client, "certificate has expired").await;
}

#[tokio::test]
async fn a_silo_cannot_pass_for_the_server() {
    let north = Federation::new("north");
    let silo = north.identity(Role::Silo, "mallory");
    let config = unchecked_server(&north.roots(), "north", &silo);
    let server = Running::start_with(config, AcceptorLimits::default());
    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    assert_client_refuses(&server, client, "not for this purpose").await;
}

#[tokio::test]
async fn a_silo_with_a_certificate_for_every_purpose_cannot_pass_for_the_server() {
    let north = Federation::new("north");
    let id = crate::SpiffeId::new("north", Role::Silo, "mallory").unwrap();
    let forged = forge(&north.ca, &id, |params| {
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
    });
    let identity =
        Identity::from_pem(forged.certificate_pem.as_bytes(), forged.key_pem.as_bytes()).unwrap();
    let config = unchecked_server(&north.roots(), "north", &identity);
    let server = Running::start_with(config, AcceptorLimits::default());
    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    assert_client_refuses(&server, client, "which is no server").await;
}

#[tokio::test]
async fn a_certificate_can_be_changed_without_a_restart() {
    let (old, new) = (Federation::new("north"), Federation::new("north"));
    let server = Running::start(&old);
    let early = server.channel(old.client(&old.identity(Role::Silo, "clinic-a")));
    call(&early).await.unwrap();

    let identity = new.identity(Role::Server, "main");
    let config = server_config(&identity, &new.roots(), "north").unwrap();
    server.tls.send(config).unwrap();

    let late = server.channel(new.client(&new.identity(Role::Silo, "clinic-b")));
    call(&late).await.unwrap();
    // The connection from before goes on, and whoever comes with the old CA's certificate is refused.
    call(&early).await.unwrap();
    assert_client_refuses(
        &server,
        old.client(&old.identity(Role::Silo, "clinic-a")),
        "not signed by the CA",
    )
    .await;
}

#[tokio::test]
async fn a_client_takes_its_newest_certificate_at_each_connection() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let expired = north.identity_at(Role::Silo, "clinic-a", now() - DAY * 2, DAY);
    let (sender, receiver) = tokio::sync::watch::channel(north.client(&expired));
    let channel = server.channel(receiver);
    assert!(call(&channel).await.is_err());
    sender
        .send(north.client(&north.identity(Role::Silo, "clinic-a")))
        .unwrap();
    call(&channel).await.unwrap();
}

#[tokio::test]
async fn both_sides_agree_on_tls_1_3_with_aes_128_and_never_resume() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    for _ in 0..2 {
        let stream = server.connect_raw(Arc::clone(&client)).await;
        let (_, session) = stream.get_ref();
        assert_eq!(
            session.protocol_version(),
            Some(rustls::ProtocolVersion::TLSv1_3)
        );
        assert_eq!(
            session.negotiated_cipher_suite().map(|suite| suite.suite()),
            Some(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256)
        );
        assert_eq!(session.alpn_protocol(), Some(ALPN));
        assert_eq!(session.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

#[test]
fn no_process_wide_provider_is_installed() {
    let north = Federation::new("north");
    north.client(&north.identity(Role::Silo, "clinic-a"));
    assert!(rustls::crypto::CryptoProvider::get_default().is_none());
}

#[test]
fn a_ca_can_be_replaced_with_both_trusted_for_a_while() {
    let ca = CertificateAuthority::create("north", now(), 1).unwrap();
    let both = format!(
        "{}{}",
        Federation::new("north").ca.certificate_pem(),
        ca.certificate_pem()
    );
    assert_eq!(
        TrustRoots::from_pem(both.as_bytes()).unwrap().store().len(),
        2
    );
}
