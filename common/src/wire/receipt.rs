//! Receipts: the server's signed word on what became of a contribution.
//!
//! The signature is Ed25519 (RFC 8032) over the canonical form, which is the ASCII text `concord.v1 receipt` and a zero
//! byte, and then these fields, each as its length in bytes (`u64` little-endian) and its bytes:
//!
//! 1. job id (UTF-8)
//! 2. round (`u32` little-endian)
//! 3. silo id (UTF-8)
//! 4. BLAKE3 of the payload (32 bytes)
//! 5. outcome (ASCII: `accepted`, `rejected` or `discarded`)
//! 6. reason (ASCII code, empty when accepted)
//! 7. time of recording (milliseconds since 1970-01-01T00:00:00Z, `i64` little-endian)

use concord_proto::v1;
use ring::{
    rand::SystemRandom,
    signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey},
};

use super::{
    digest, job_id, outcome_from_proto, outcome_to_proto, required, round_number, silo_id,
};
use crate::{
    Digest, ErrorCode, JobId, RoundNumber, SiloId, Timestamp, code::Refusal, round::Outcome,
};

const DOMAIN: &[u8] = b"concord.v1 receipt\0";
/// Length of an Ed25519 public key.
pub const PUBLIC_KEY_BYTES: usize = 32;
/// Length of an Ed25519 signature.
pub const SIGNATURE_BYTES: usize = 64;

/// A key that cannot sign, or a receipt that the server did not sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    /// The private key is no Ed25519 key in PKCS#8.
    #[error("the receipt key is no Ed25519 private key in PKCS#8 form")]
    Key,
    /// The machine gave no randomness for a new key.
    #[error("no randomness for a new receipt key")]
    Random,
    /// The signature does not belong to this receipt and key.
    #[error("the receipt's signature does not verify: it was changed, or another server signed it")]
    Signature,
}

/// What the server acknowledges.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Receipt {
    /// Job.
    pub job: JobId,
    /// Round.
    pub round: RoundNumber,
    /// Who contributed.
    pub silo: SiloId,
    /// BLAKE3 of the payload.
    pub payload_digest: Digest,
    /// Accepted, rejected or discarded.
    pub outcome: Outcome,
    /// When the server recorded it.
    pub recorded_at: Timestamp,
}

impl Receipt {
    /// The bytes that are signed; see the module's documentation.
    pub fn canonical_bytes(&self) -> Vec<u8> {
        let round = self.round.0.to_le_bytes();
        let recorded_at = self.recorded_at.as_millis().to_le_bytes();
        let fields: [&[u8]; 7] = [
            self.job.as_str().as_bytes(),
            &round,
            self.silo.as_str().as_bytes(),
            self.payload_digest.as_bytes(),
            self.outcome.as_str().as_bytes(),
            self.outcome
                .reason()
                .map_or("", ErrorCode::as_str)
                .as_bytes(),
            &recorded_at,
        ];
        let mut bytes = DOMAIN.to_vec();
        for field in fields {
            bytes.extend_from_slice(&(field.len() as u64).to_le_bytes());
            bytes.extend_from_slice(field);
        }
        bytes
    }
}

/// A receipt with the server's signature, not necessarily checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SignedReceipt {
    /// What is acknowledged.
    pub receipt: Receipt,
    /// Ed25519 over [`Receipt::canonical_bytes`].
    pub signature: [u8; SIGNATURE_BYTES],
}

impl SignedReceipt {
    /// Checks the signature against the server's public key.
    ///
    /// # Errors
    /// [`ReceiptError::Signature`].
    pub fn verify(&self, public_key: &[u8]) -> Result<(), ReceiptError> {
        UnparsedPublicKey::new(&ED25519, public_key)
            .verify(&self.receipt.canonical_bytes(), &self.signature)
            .map_err(|_| ReceiptError::Signature)
    }

    /// The wire form.
    pub fn to_proto(&self) -> v1::Receipt {
        let (outcome, reason) = outcome_to_proto(Some(self.receipt.outcome));
        v1::Receipt {
            job_id: self.receipt.job.to_string(),
            round: self.receipt.round.0,
            silo_id: self.receipt.silo.to_string(),
            payload_digest: self.receipt.payload_digest.to_vec(),
            outcome: outcome as i32,
            reason,
            recorded_at: Some(self.receipt.recorded_at.to_proto()),
            signature: self.signature.to_vec(),
        }
    }

    /// From the wire form; the signature is not checked yet.
    ///
    /// # Errors
    /// `INVALID_REQUEST` naming the field that is missing or malformed.
    pub fn from_proto(proto: &v1::Receipt) -> Result<Self, Refusal> {
        let signature = proto.signature.as_slice().try_into().map_err(|_| {
            Refusal::new(
                ErrorCode::InvalidRequest,
                format!(
                    "`signature`: must have {SIGNATURE_BYTES} bytes, has {}",
                    proto.signature.len()
                ),
            )
        })?;
        let outcome = outcome_from_proto(proto.outcome, &proto.reason)?
            .ok_or_else(|| Refusal::new(ErrorCode::InvalidRequest, "`outcome`: is missing"))?;
        Ok(Self {
            receipt: Receipt {
                job: job_id(&proto.job_id)?,
                round: round_number(proto.round)?,
                silo: silo_id(&proto.silo_id)?,
                payload_digest: digest("payload_digest", &proto.payload_digest)?,
                outcome,
                recorded_at: Timestamp::from_proto(required(
                    "recorded_at",
                    proto.recorded_at.as_ref(),
                )?),
            },
            signature,
        })
    }
}

/// The server's receipt key.
#[derive(Debug)]
pub struct ReceiptSigner {
    key: Ed25519KeyPair,
}

impl ReceiptSigner {
    /// A new private key in PKCS#8 form, to be kept in a file of mode 0600.
    ///
    /// # Errors
    /// [`ReceiptError::Random`].
    pub fn generate_pkcs8() -> Result<Vec<u8>, ReceiptError> {
        Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map(|document| document.as_ref().to_vec())
            .map_err(|_| ReceiptError::Random)
    }

    /// The signer of a private key in PKCS#8 DER form.
    ///
    /// # Errors
    /// [`ReceiptError::Key`].
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, ReceiptError> {
        Ed25519KeyPair::from_pkcs8_maybe_unchecked(der)
            .map(|key| Self { key })
            .map_err(|_| ReceiptError::Key)
    }

    /// The key that receipts verify with.
    pub fn public_key(&self) -> [u8; PUBLIC_KEY_BYTES] {
        let mut bytes = [0; PUBLIC_KEY_BYTES];
        bytes.copy_from_slice(self.key.public_key().as_ref());
        bytes
    }

    /// Signs. The same receipt always gets the same signature.
    pub fn sign(&self, receipt: Receipt) -> SignedReceipt {
        let mut signature = [0; SIGNATURE_BYTES];
        signature.copy_from_slice(self.key.sign(&receipt.canonical_bytes()).as_ref());
        SignedReceipt { receipt, signature }
    }
}
