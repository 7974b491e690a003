//! Names of things, checked when they are made: [`SiloId`], [`JobId`], [`RoundNumber`], [`SpiffeId`].

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A text that cannot be the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {what}: {rule}")]
pub struct InvalidId {
    what: &'static str,
    text: String,
    rule: &'static str,
}

impl InvalidId {
    fn new(what: &'static str, text: &str, rule: &'static str) -> Self {
        Self {
            what,
            text: text.chars().take(80).collect(),
            rule,
        }
    }
}

const NAME_RULE: &str =
    "use 1 to 63 lowercase letters, digits, `-`, `_` or `.`, beginning with a letter or digit";

fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.')
        })
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                if is_name(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(InvalidId::new($what, text, NAME_RULE))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// An organisation in the federation; the last part of its certificate's SPIFFE id.
    SiloId,
    "silo id"
);
name_type!(
    /// A job; made by the server.
    JobId,
    "job id"
);

/// Number of a round in its job, counted from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RoundNumber(pub u32);

impl fmt::Display for RoundNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for RoundNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round {}", self.0)
    }
}

/// What a certificate's holder may do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// The coordinating server.
    Server,
    /// A silo's daemon.
    Silo,
    /// A person or program that submits and watches jobs.
    Operator,
    /// A process that runs server-side jobs on another machine.
    Worker,
}

impl Role {
    /// The role's part of a SPIFFE path.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Silo => "silo",
            Self::Operator => "operator",
            Self::Worker => "worker",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        match text {
            "server" => Ok(Self::Server),
            "silo" => Ok(Self::Silo),
            "operator" => Ok(Self::Operator),
            "worker" => Ok(Self::Worker),
            _ => Err(InvalidId::new(
                "role",
                text,
                "roles are server, silo, operator and worker",
            )),
        }
    }
}

/// Who a certificate speaks for: `spiffe://<federation>/<role>/<name>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SpiffeId {
    /// Trust domain.
    pub federation: String,
    /// What the holder may do.
    pub role: Role,
    /// Name within the role, by the rules of [`SiloId`].
    pub name: String,
}

impl SpiffeId {
    /// An id from its parts.
    ///
    /// # Errors
    /// If the federation or the name breaks the rule for names.
    pub fn new(federation: &str, role: Role, name: &str) -> Result<Self, InvalidId> {
        for (what, text) in [("federation", federation), ("name", name)] {
            if !is_name(text) {
                return Err(InvalidId::new(what, text, NAME_RULE));
            }
        }
        Ok(Self {
            federation: federation.to_owned(),
            role,
            name: name.to_owned(),
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/{}/{}",
            self.federation, self.role, self.name
        )
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let refuse = || {
            InvalidId::new(
                "SPIFFE id",
                text,
                "expected spiffe://<federation>/<role>/<name>",
            )
        };
        let rest = text.strip_prefix("spiffe://").ok_or_else(refuse)?;
        let mut parts = rest.split('/');
        let (Some(federation), Some(role), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(refuse());
        };
        Self::new(federation, role.parse()?, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spiffe_id_survives_its_text_form() {
        let id = SpiffeId::new("north", Role::Silo, "clinic-a").unwrap();
        assert_eq!(id.to_string(), "spiffe://north/silo/clinic-a");
        assert_eq!(id.to_string().parse::<SpiffeId>(), Ok(id));
    }

    #[test]
    fn a_spiffe_id_with_more_or_fewer_parts_is_refused() {
        for text in [
            "spiffe://north/silo",
            "spiffe://north/silo/a/b",
            "https://north/silo/a",
            "spiffe:///silo/a",
            "spiffe://north/king/a",
            "spiffe://north/silo/A",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_silo_id_cannot_climb_out_of_a_folder() {
        for text in ["..", "a/b", "", ".hidden", "a b"] {
            assert!(text.parse::<SiloId>().is_err(), "{text}");
        }
    }
}
