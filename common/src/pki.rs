//! The federation's certificates: one CA, and one certificate for each server, silo, operator and worker.
//!
//! Everything is made in memory; only the `write` functions touch the disk. The CA carries no name constraints: the ones for
//! URIs, which would hold it to its federation, are refused by the verifier used here (and by others), and the federation is
//! checked in the leaf by both sides anyway.

mod facts;
mod files;

use std::{net::IpAddr, path::PathBuf, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber, string::Ia5String,
};
use time::OffsetDateTime;

pub use self::{
    facts::{CertificateFacts, inspect},
    files::{CA_CERTIFICATE, CA_KEY, WrittenCertificate},
};
use crate::{Role, SpiffeId, Timestamp};

/// Length of a day.
pub const DAY: Duration = Duration::from_hours(24);

/// Why a certificate could not be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file is there already and would be lost.
    #[error("{path} is there already; remove it, or say --force to replace it")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file or folder cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is no CA of Concord's.
    #[error("{path} cannot be used as a CA: {reason}")]
    BadCa {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A CA's key that others than its owner can read.
    #[error(
        "the CA's key {path} can be read by others (mode {mode:04o}); make it private: chmod 600 {path}"
    )]
    KeyNotPrivate {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A text is no certificate.
    #[error("this is no certificate: {0}")]
    BadCertificate(String),
    /// A name that a certificate cannot carry.
    #[error(transparent)]
    Name(#[from] crate::id::InvalidId),
    /// An id of another federation than the CA's.
    #[error("{id} is not of the federation `{federation}`, which this CA is for")]
    OtherFederation {
        /// The id that was asked for.
        id: SpiffeId,
        /// The CA's federation.
        federation: String,
    },
    /// The certificate would outlive its CA.
    #[error(
        "the certificate would end at {wanted}, after its CA ({ca_end}); ask for a shorter validity, or make a new CA"
    )]
    OutlivesCa {
        /// The end that was asked for.
        wanted: Timestamp,
        /// The CA's end.
        ca_end: Timestamp,
    },
    /// A time that a certificate cannot express.
    #[error("{0} cannot stand in a certificate")]
    Time(Timestamp),
    /// Key generation or encoding failed.
    #[error("cannot make the certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// A federation's CA with its key.
pub struct CertificateAuthority {
    federation: String,
    certificate_pem: String,
    not_after: Timestamp,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateAuthority")
            .field("federation", &self.federation)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// A certificate and its key, as PEM text.
#[derive(Clone)]
pub struct IssuedCertificate {
    /// Who it speaks for.
    pub id: SpiffeId,
    /// The certificate.
    pub certificate_pem: String,
    /// The key. A secret.
    pub key_pem: String,
}

impl std::fmt::Debug for IssuedCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuedCertificate")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl CertificateAuthority {
    /// A new CA (ECDSA P-256) for `federation`, valid for `days` days from `not_before`. Its own name is the URI
    /// `spiffe://<federation>`; it can sign leaf certificates only.
    ///
    /// # Errors
    /// If the federation's name is not acceptable, or the time cannot be expressed.
    pub fn create(federation: &str, not_before: Timestamp, days: u32) -> Result<Self, PkiError> {
        SpiffeId::new(federation, Role::Server, "check")?;
        let key = KeyPair::generate()?;
        let serial = serial_number()?;
        let not_after = not_before + DAY * days;
        let mut params = CertificateParams::default();
        // The serial makes the name unique: two CAs of one federation can stand side by side while one replaces the other.
        let name = format!("Concord CA {federation} {}", &crate::tls::hex(&serial)[..8]);
        set_subject(&mut params, &name);
        params.subject_alt_names = vec![SanType::URI(ia5(&format!("spiffe://{federation}"))?)];
        params.serial_number = Some(SerialNumber::from(serial));
        params.not_before = moment(not_before)?;
        params.not_after = moment(not_after)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            federation: federation.to_owned(),
            certificate_pem: certificate.pem(),
            not_after,
            issuer: Issuer::new(params, key),
        })
    }

    /// The federation that it is for.
    pub fn federation(&self) -> &str {
        &self.federation
    }

    /// The CA's certificate.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// When the CA's certificate ends.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// A certificate (ECDSA P-256) for `id`, with a new key. `dns_names` and `ips` are for other programs' benefit: Concord
    /// identifies a server by its SPIFFE id. A server's certificate can only be used by a server, any other only by a client.
    ///
    /// # Errors
    /// If `id` is of another federation, a DNS name is not acceptable, or the certificate would outlive the CA.
    pub fn issue(
        &self,
        id: &SpiffeId,
        dns_names: &[String],
        ips: &[IpAddr],
        not_before: Timestamp,
        validity: Duration,
    ) -> Result<IssuedCertificate, PkiError> {
        if id.federation != self.federation {
            return Err(PkiError::OtherFederation {
                id: id.clone(),
                federation: self.federation.clone(),
            });
        }
        let not_after = not_before + validity;
        if not_after > self.not_after {
            return Err(PkiError::OutlivesCa {
                wanted: not_after,
                ca_end: self.not_after,
            });
        }
        let mut params = leaf_params(id)?;
        for name in dns_names {
            params.subject_alt_names.push(SanType::DnsName(ia5(name)?));
        }
        params
            .subject_alt_names
            .extend(ips.iter().copied().map(SanType::IpAddress));
        params.not_before = moment(not_before)?;
        params.not_after = moment(not_after)?;
        self.sign(id, &params)
    }

    fn sign(
        &self,
        id: &SpiffeId,
        params: &CertificateParams,
    ) -> Result<IssuedCertificate, PkiError> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(IssuedCertificate {
            id: id.clone(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }
}

/// A leaf's contents without its validity and further names.
fn leaf_params(id: &SpiffeId) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    set_subject(&mut params, &format!("{} {}", id.role, id.name));
    params.subject_alt_names = vec![SanType::URI(ia5(&id.to_string())?)];
    params.serial_number = Some(SerialNumber::from(serial_number()?));
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match id.role {
        Role::Server => ExtendedKeyUsagePurpose::ServerAuth,
        Role::Silo | Role::Operator | Role::Worker => ExtendedKeyUsagePurpose::ClientAuth,
    }];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn set_subject(params: &mut CertificateParams, name: &str) {
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, DnValue::Utf8String(name.to_owned()));
}

fn ia5(text: &str) -> Result<Ia5String, PkiError> {
    Ok(Ia5String::try_from(text)?)
}

fn moment(time: Timestamp) -> Result<OffsetDateTime, PkiError> {
    OffsetDateTime::from_unix_timestamp(time.as_millis().div_euclid(1000))
        .map_err(|_| PkiError::Time(time))
}

/// 16 random bytes, positive as DER wants it (RFC 5280 section 4.1.2.2).
fn serial_number() -> Result<Vec<u8>, PkiError> {
    let random: [u8; 16] = ring::rand::generate(&ring::rand::SystemRandom::new())
        .map_err(|_| rcgen::Error::RingUnspecified)?
        .expose();
    let mut serial = random.to_vec();
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

#[cfg(test)]
pub(crate) mod forge;
#[cfg(test)]
mod tests;
