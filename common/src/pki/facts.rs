//! What stands in a certificate, for people.

use std::fmt;

use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::PkiError;
use crate::{Timestamp, tls::hex};

/// What a certificate says. Nothing of it is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// The URI names; a leaf of Concord's has exactly one, a SPIFFE id.
    pub uris: Vec<String>,
    /// The DNS names.
    pub dns_names: Vec<String>,
    /// Subject, as a distinguished name.
    pub subject: String,
    /// Issuer, as a distinguished name.
    pub issuer: String,
    /// Serial number in hexadecimal.
    pub serial: String,
    /// Begin of validity.
    pub not_before: Timestamp,
    /// End of validity.
    pub not_after: Timestamp,
    /// Whether it can sign certificates.
    pub is_ca: bool,
    /// Whether a server may use it.
    pub server_auth: bool,
    /// Whether a client may use it.
    pub client_auth: bool,
    /// SHA-256 over the certificate, in hexadecimal.
    pub sha256: String,
}

/// Reads the first certificate of a PEM text.
///
/// # Errors
/// If there is none, or it cannot be parsed.
pub fn inspect(pem: &[u8]) -> Result<CertificateFacts, PkiError> {
    let bad = |error: &dyn fmt::Display| PkiError::BadCertificate(error.to_string());
    let der = CertificateDer::from_pem_slice(pem).map_err(|error| bad(&error))?;
    let (_, certificate) = X509Certificate::from_der(&der).map_err(|error| bad(&error))?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| bad(&error))?;
    let (mut uris, mut dns_names) = (Vec::new(), Vec::new());
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::URI(uri) => uris.push((*uri).to_owned()),
            GeneralName::DNSName(name) => dns_names.push((*name).to_owned()),
            _ => {}
        }
    }
    let usage = certificate
        .extended_key_usage()
        .map_err(|error| bad(&error))?;
    let seconds = |time: i64| Timestamp(time.saturating_mul(1000));
    Ok(CertificateFacts {
        uris,
        dns_names,
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        serial: hex(certificate.raw_serial()),
        not_before: seconds(certificate.validity().not_before.timestamp()),
        not_after: seconds(certificate.validity().not_after.timestamp()),
        is_ca: certificate.is_ca(),
        server_auth: usage.as_ref().is_some_and(|usage| usage.value.server_auth),
        client_auth: usage.as_ref().is_some_and(|usage| usage.value.client_auth),
        sha256: hex(ring::digest::digest(&ring::digest::SHA256, &der).as_ref()),
    })
}

impl fmt::Display for CertificateFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let purpose = match (self.is_ca, self.server_auth, self.client_auth) {
            (true, _, _) => "CA",
            (_, true, true) => "server and client",
            (_, true, false) => "server",
            (_, false, true) => "client",
            (_, false, false) => "none",
        };
        writeln!(f, "identity    {}", self.uris.join(", "))?;
        if !self.dns_names.is_empty() {
            writeln!(f, "dns names   {}", self.dns_names.join(", "))?;
        }
        writeln!(f, "purpose     {purpose}")?;
        writeln!(f, "subject     {}", self.subject)?;
        writeln!(f, "issuer      {}", self.issuer)?;
        writeln!(f, "serial      {}", self.serial)?;
        writeln!(f, "valid from  {}", self.not_before)?;
        writeln!(f, "valid to    {}", self.not_after)?;
        write!(f, "sha256      {}", self.sha256)
    }
}
