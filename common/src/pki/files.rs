//! Certificates on disk: `ca.crt`, `ca.key`, `<role>-<name>.crt`, `<role>-<name>.key`; keys for their owner only.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use rcgen::{Issuer, KeyPair};

use super::{CertificateAuthority, IssuedCertificate, PkiError, inspect};
use crate::fsutil::{mode, write_atomic};

/// File name of a CA's certificate.
pub const CA_CERTIFICATE: &str = "ca.crt";
/// File name of a CA's key.
pub const CA_KEY: &str = "ca.key";

const FOLDER_MODE: u32 = 0o700;
const KEY_MODE: u32 = 0o600;
const CERTIFICATE_MODE: u32 = 0o644;

/// Where a certificate and its key were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenCertificate {
    /// The certificate.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
}

impl CertificateAuthority {
    /// Writes the CA into `folder`, which is made (0700) if it is not there.
    ///
    /// # Errors
    /// If one of the files is there and `force` is not said, or on any I/O error; nothing is overwritten then.
    pub fn write(&self, folder: &Path, force: bool) -> Result<WrittenCertificate, PkiError> {
        write_pair(
            folder,
            (CA_CERTIFICATE, &self.certificate_pem),
            (CA_KEY, &self.issuer.key().serialize_pem()),
            force,
        )
    }

    /// Reads a CA that [`Self::write`] wrote.
    ///
    /// # Errors
    /// If a file is missing or is no CA's certificate or key, or others can read the key; the error names the file.
    pub fn load(folder: &Path) -> Result<Self, PkiError> {
        let certificate_file = folder.join(CA_CERTIFICATE);
        let key_file = folder.join(CA_KEY);
        let certificate_pem = read(&certificate_file)?;
        let mode = mode(&key_file).map_err(|source| PkiError::Io {
            path: key_file.clone(),
            source,
        })?;
        if mode & 0o077 != 0 {
            return Err(PkiError::KeyNotPrivate {
                path: key_file,
                mode,
            });
        }
        let key_pem = read(&key_file)?;
        let bad = |path: &Path, reason: String| PkiError::BadCa {
            path: path.to_owned(),
            reason,
        };
        let facts = inspect(certificate_pem.as_bytes())
            .map_err(|error| bad(&certificate_file, error.to_string()))?;
        if !facts.is_ca {
            return Err(bad(
                &certificate_file,
                "it is no CA's certificate".to_owned(),
            ));
        }
        let federation = match &facts.uris[..] {
            [uri] => uri
                .strip_prefix("spiffe://")
                .filter(|rest| !rest.contains('/')),
            _ => None,
        }
        .ok_or_else(|| {
            bad(
                &certificate_file,
                "it does not name its federation (one URI, spiffe://<federation>)".to_owned(),
            )
        })?
        .to_owned();
        let key = KeyPair::from_pem(&key_pem).map_err(|error| bad(&key_file, error.to_string()))?;
        if !belongs(&certificate_pem, &key) {
            return Err(bad(
                &key_file,
                format!("it is not the key of {}", certificate_file.display()),
            ));
        }
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key)
            .map_err(|error| bad(&certificate_file, error.to_string()))?;
        Ok(Self {
            federation,
            certificate_pem,
            not_after: facts.not_after,
            issuer,
        })
    }
}

impl IssuedCertificate {
    /// Name of the files without their ending, `<role>-<name>`.
    pub fn file_stem(&self) -> String {
        format!("{}-{}", self.id.role, self.id.name)
    }

    /// Writes certificate and key into `folder`, which is made (0700) if it is not there.
    ///
    /// # Errors
    /// If one of the files is there and `force` is not said, or on any I/O error; nothing is overwritten then.
    pub fn write(&self, folder: &Path, force: bool) -> Result<WrittenCertificate, PkiError> {
        let stem = self.file_stem();
        write_pair(
            folder,
            (&format!("{stem}.crt"), &self.certificate_pem),
            (&format!("{stem}.key"), &self.key_pem),
            force,
        )
    }
}

fn belongs(certificate_pem: &str, key: &KeyPair) -> bool {
    use rcgen::PublicKeyData as _;
    use rustls_pki_types::{CertificateDer, pem::PemObject as _};
    use x509_parser::prelude::{FromDer as _, X509Certificate};

    let Ok(der) = CertificateDer::from_pem_slice(certificate_pem.as_bytes()) else {
        return false;
    };
    X509Certificate::from_der(&der)
        .is_ok_and(|(_, certificate)| certificate.public_key().raw == key.subject_public_key_info())
}

fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(|source| PkiError::Io {
        path: path.to_owned(),
        source,
    })
}

fn write_pair(
    folder: &Path,
    (certificate_name, certificate): (&str, &str),
    (key_name, key): (&str, &str),
    force: bool,
) -> Result<WrittenCertificate, PkiError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| PkiError::Io { path, source }
    };
    let written = WrittenCertificate {
        certificate: folder.join(certificate_name),
        key: folder.join(key_name),
    };
    if !force {
        for path in [&written.certificate, &written.key] {
            if path.try_exists().map_err(failed(path))? {
                return Err(PkiError::Exists { path: path.clone() });
            }
        }
    }
    DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(folder)
        .map_err(failed(folder))?;
    write_atomic(&written.key, key.as_bytes(), KEY_MODE).map_err(failed(&written.key))?;
    write_atomic(
        &written.certificate,
        certificate.as_bytes(),
        CERTIFICATE_MODE,
    )
    .map_err(failed(&written.certificate))?;
    Ok(written)
}
