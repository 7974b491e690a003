//! Certificates and keys from files, and the identity inside a certificate.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{CertificateError, InconsistentKeys, RootCertStore, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _};
use serde::Deserialize;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::{TlsError, provider, verify};
use crate::{Role, SpiffeId, Timestamp, fsutil, id::InvalidId};

/// Where one side's TLS material lies; all three are PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// This side's certificate, followed by intermediate ones if there are any.
    pub certificate: PathBuf,
    /// The certificate's private key; only its owner may be able to read it.
    pub key: PathBuf,
    /// The federation's CA certificate, or several while it is being replaced.
    pub ca: PathBuf,
}

impl TlsFiles {
    /// Reads all three files.
    ///
    /// # Errors
    /// As for [`Identity::load`] and [`TrustRoots::load`].
    pub fn load(&self) -> Result<(Identity, TrustRoots), TlsError> {
        Ok((
            Identity::load(&self.certificate, &self.key)?,
            TrustRoots::load(&self.ca)?,
        ))
    }
}

/// Why a certificate does not tell who it speaks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It is no X.509 certificate.
    #[error("it is no X.509 certificate: {0}")]
    Malformed(String),
    /// It has no URI, or several, where exactly one is needed.
    #[error(
        "it has {0} URI names where exactly one is needed (spiffe://<federation>/<role>/<name>)"
    )]
    UriCount(usize),
    /// The URI is no SPIFFE id of Concord's form.
    #[error(transparent)]
    Id(#[from] InvalidId),
}

/// Who a verified certificate speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// Federation, role and name.
    pub id: SpiffeId,
    /// The certificate's serial number, in hexadecimal.
    pub serial: String,
    /// When the certificate ends.
    pub not_after: Timestamp,
}

impl PeerIdentity {
    /// Reads the identity out of a leaf certificate. This checks no signature: it is for certificates already verified, or
    /// one's own.
    ///
    /// # Errors
    /// If `der` is no certificate or has not exactly one URI name that is a SPIFFE id.
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        let malformed = |error: &dyn std::fmt::Display| IdentityError::Malformed(error.to_string());
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| malformed(&error))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| malformed(&error))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        let [uri] = uris[..] else {
            return Err(IdentityError::UriCount(uris.len()));
        };
        Ok(Self {
            id: uri.parse()?,
            serial: hex(certificate.raw_serial()),
            not_after: Timestamp(
                certificate
                    .validity()
                    .not_after
                    .timestamp()
                    .saturating_mul(1000),
            ),
        })
    }
}

/// Bytes as lowercase hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        for half in [byte >> 4, byte & 15] {
            text.push(char::from(b"0123456789abcdef"[usize::from(half)]));
        }
        text
    })
}

/// One's own certificate chain and key.
#[derive(Debug, Clone)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    peer: PeerIdentity,
    file: PathBuf,
}

impl Identity {
    /// Reads a PEM certificate chain and its PEM key.
    ///
    /// Nobody but its owner may be able to read the key. In the folder that systemd gives a service its credentials in
    /// (`$CREDENTIALS_DIRECTORY`) the group may, too: there systemd owns the file and lets the service's user in by an access
    /// control list, whose mask shows as the group's bits (mode 0440), and the folder is closed to everybody else.
    ///
    /// # Errors
    /// If a file cannot be read or parsed, the key can be read by others, the key is not the certificate's, or the certificate
    /// has no SPIFFE id. The error names the file.
    pub fn load(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        Self::load_with(certificate, key, credentials.as_deref())
    }

    /// The same with the folder of the service's credentials, if there is one.
    pub(super) fn load_with(
        certificate: &Path,
        key: &Path,
        credentials: Option<&Path>,
    ) -> Result<Self, TlsError> {
        let chain = read(certificate)?;
        let mode = fsutil::mode(key).map_err(|source| TlsError::Read {
            path: key.to_owned(),
            source,
        })?;
        let is_credential = credentials.is_some() && key.parent() == credentials;
        let closed = if is_credential { 0o037 } else { 0o077 };
        if mode & closed != 0 {
            return Err(TlsError::KeyNotPrivate {
                path: key.to_owned(),
                mode,
            });
        }
        Self::build(&chain, &read(key)?, certificate, key)
    }

    /// The same from PEM text in memory; errors speak of "the given certificate" and "the given key".
    ///
    /// # Errors
    /// As for [`Self::load`].
    pub fn from_pem(certificate: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        Self::build(
            certificate,
            key,
            Path::new("the given certificate"),
            Path::new("the given key"),
        )
    }

    fn build(
        chain: &[u8],
        key: &[u8],
        chain_file: &Path,
        key_file: &Path,
    ) -> Result<Self, TlsError> {
        let chain = certificates(chain, chain_file)?;
        let bad_key = |reason: String| TlsError::BadKey {
            path: key_file.to_owned(),
            reason,
        };
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| bad_key(describe(&error)))?;
        let peer = PeerIdentity::from_der(&chain[0]).map_err(|source| TlsError::Identity {
            path: chain_file.to_owned(),
            source,
        })?;
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                TlsError::KeyMismatch {
                    certificate: chain_file.to_owned(),
                    key: key_file.to_owned(),
                }
            }
            other => bad_key(other.to_string()),
        })?;
        Ok(Self {
            key: Arc::new(key),
            peer,
            file: chain_file.to_owned(),
        })
    }

    /// Who the certificate speaks for.
    pub fn id(&self) -> &SpiffeId {
        &self.peer.id
    }

    /// The same with the certificate's serial number and end.
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// When the certificate ends.
    pub fn not_after(&self) -> Timestamp {
        self.peer.not_after
    }

    /// Refuses a certificate of another federation than `federation`.
    ///
    /// # Errors
    /// [`TlsError::WrongIdentity`].
    pub fn require_federation(&self, federation: &str) -> Result<(), TlsError> {
        if self.id().federation == federation {
            return Ok(());
        }
        Err(self.wrong(format!("the federation here is `{federation}`")))
    }

    /// Refuses a certificate whose role is none of `roles`.
    ///
    /// # Errors
    /// [`TlsError::WrongIdentity`].
    pub fn require_role(&self, roles: &[Role]) -> Result<(), TlsError> {
        if roles.contains(&self.id().role) {
            return Ok(());
        }
        let roles: Vec<_> = roles.iter().map(|role| role.as_str()).collect();
        Err(self.wrong(format!("the role needed here is {}", roles.join(" or "))))
    }

    /// Checks what a peer that trusts `roots` would: that the certificate chains to them and is valid at `now`.
    ///
    /// # Errors
    /// [`TlsError::Unusable`] with what to do about it.
    pub fn check(&self, roots: &TrustRoots, now: Timestamp) -> Result<(), TlsError> {
        verify::check_own(self, roots, now).map_err(|error| {
            let reason = match error {
                rustls::Error::InvalidCertificate(
                    CertificateError::Expired | CertificateError::ExpiredContext { .. },
                ) => format!("it ended at {}; have a new one issued", self.peer.not_after),
                rustls::Error::InvalidCertificate(
                    CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
                ) => "it is not valid yet; look at this machine's clock".to_owned(),
                error if verify::is_foreign(&error) => {
                    format!("it is not signed by the CA in {}", roots.file.display())
                }
                other => other.to_string(),
            };
            TlsError::Unusable {
                path: self.file.clone(),
                reason,
            }
        })
    }

    fn wrong(&self, wanted: String) -> TlsError {
        TlsError::WrongIdentity {
            path: self.file.clone(),
            found: self.id().clone(),
            wanted,
        }
    }

    pub(super) fn certified_key(&self) -> Arc<CertifiedKey> {
        self.key.clone()
    }
}

/// The CA certificates that a peer's certificate must chain to.
#[derive(Debug, Clone)]
pub struct TrustRoots {
    roots: Arc<RootCertStore>,
    file: PathBuf,
}

impl TrustRoots {
    /// Reads one or more PEM certificates.
    ///
    /// # Errors
    /// If the file cannot be read or holds anything that is no certificate; the error names the file.
    pub fn load(path: &Path) -> Result<Self, TlsError> {
        Self::build(&read(path)?, path)
    }

    /// The same from PEM text in memory; errors speak of "the given CA".
    ///
    /// # Errors
    /// As for [`Self::load`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, TlsError> {
        Self::build(pem, Path::new("the given CA"))
    }

    fn build(pem: &[u8], file: &Path) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(pem, file)? {
            roots
                .add(certificate)
                .map_err(|error| TlsError::BadCertificate {
                    path: file.to_owned(),
                    reason: error.to_string(),
                })?;
        }
        Ok(Self {
            roots: Arc::new(roots),
            file: file.to_owned(),
        })
    }

    pub(super) fn store(&self) -> Arc<RootCertStore> {
        self.roots.clone()
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Every certificate of a PEM text, at least one.
fn certificates(text: &[u8], file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad = |reason: String| TlsError::BadCertificate {
        path: file.to_owned(),
        reason,
    };
    let certificates = CertificateDer::pem_slice_iter(text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| bad(describe(&error)))?;
    if certificates.is_empty() {
        return Err(bad(describe(&pem::Error::NoItemsFound)));
    }
    Ok(certificates)
}

fn describe(error: &pem::Error) -> String {
    match error {
        pem::Error::NoItemsFound => "nothing of this kind is in the file".to_owned(),
        other => other.to_string(),
    }
}
