//! TLS errors as sentences that say what to do.

use std::error::Error as StdError;

use rustls::{AlertDescription, CertificateError, Error};

use super::ConnectError;

/// Finds the TLS error that `error` comes from, through tonic's, hyper's and the I/O layers, and says it in a sentence; none if TLS is not the cause.
pub fn explain_tls_error(error: &(dyn StdError + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(ConnectError::Refused { reason, .. }) = error.downcast_ref() {
            return Some(reason.clone());
        }
        if let Some(error) = error.downcast_ref::<Error>() {
            return Some(explain(error));
        }
        // An I/O error's `source` skips the error inside it.
        next = match error.downcast_ref::<std::io::Error>() {
            Some(io) => io.get_ref().map(|inner| inner as &(dyn StdError + 'static)),
            None => error.source(),
        };
    }
    None
}

/// The rustls error inside an I/O error, if there is one.
pub(super) fn rustls_error(error: &std::io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// One sentence for a rustls error, from the side of the one who reads it.
pub(super) fn explain(error: &Error) -> String {
    let sentence = match error {
        Error::AlertReceived(alert) => return explain_alert(*alert),
        Error::InvalidCertificate(problem) => match problem {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the peer's certificate has expired"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "the peer's certificate is not valid yet; compare the two machines' clocks"
            }
            CertificateError::UnknownIssuer => {
                "the peer's certificate is not signed by the federation's CA"
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                "the peer's certificate is not for this purpose (a client's used as a server's, or the reverse)"
            }
            CertificateError::ApplicationVerificationFailure => {
                "the peer's certificate belongs to another federation"
            }
            CertificateError::Other(inner) => return inner.to_string(),
            other => return format!("the peer's certificate cannot be used: {other}"),
        },
        Error::NoCertificatesPresented => "the peer presented no certificate",
        Error::PeerIncompatible(_) => "the peer does not speak TLS 1.3 as it is needed here",
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => {
            "the peer does not speak TLS"
        }
        other => return format!("the TLS handshake failed: {other}"),
    };
    sentence.to_owned()
}

/// What a server's alert means for the client that gets it.
fn explain_alert(alert: AlertDescription) -> String {
    let sentence = match alert {
        AlertDescription::CertificateExpired => {
            "the server refused this certificate: it has expired, or is not valid yet"
        }
        AlertDescription::UnknownCA => {
            "the server does not know the CA that signed this certificate"
        }
        AlertDescription::CertificateRequired => "the server wants a client certificate",
        AlertDescription::AccessDenied => {
            "the server refused this certificate: it belongs to another federation"
        }
        AlertDescription::CertificateRevoked => {
            "the server refused this certificate: it has been revoked"
        }
        AlertDescription::UnsupportedCertificate => {
            "the server refused this certificate: it is not for clients"
        }
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => {
            "the server refused this certificate: it does not name a silo, operator or worker of the federation"
        }
        AlertDescription::ProtocolVersion => "the server does not speak TLS 1.3",
        AlertDescription::NoApplicationProtocol => "the server does not speak gRPC (HTTP/2)",
        other => return format!("the server ended the TLS handshake: {other:?}"),
    };
    sentence.to_owned()
}
