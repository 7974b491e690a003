//! Certificates that [`CertificateAuthority::issue`] would refuse to make, for tests of those who check them.

use rcgen::{CertificateParams, Issuer, KeyPair};

use super::{CertificateAuthority, IssuedCertificate, leaf_params};
use crate::SpiffeId;

/// A certificate signed by `ca` whose contents `change` has changed at will. It is valid from 1975 to 4096 unless changed.
pub(crate) fn forge(
    ca: &CertificateAuthority,
    id: &SpiffeId,
    change: impl FnOnce(&mut CertificateParams),
) -> IssuedCertificate {
    let mut params = leaf_params(id).unwrap();
    change(&mut params);
    ca.sign(id, &params).unwrap()
}

/// A CA with the same name as `ca` and a key of its own.
pub(crate) fn impostor(ca: &CertificateAuthority) -> CertificateAuthority {
    let key = KeyPair::generate().unwrap();
    CertificateAuthority {
        federation: ca.federation.clone(),
        certificate_pem: ca.certificate_pem.clone(),
        not_after: ca.not_after,
        issuer: Issuer::from_ca_cert_pem(&ca.certificate_pem, key).unwrap(),
    }
}
