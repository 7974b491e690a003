//! Where new ids and tokens come from; a parameter, as time is.

use std::fmt;

use concord_common::JobId;

/// Longest part of a job's name that goes into its id.
const MAX_SLUG: usize = 40;

/// A source of ids that nobody can guess.
pub trait Ids: Send + Sync + fmt::Debug {
    /// 16 fresh bytes: a lease token or an upload id.
    fn token(&self) -> [u8; 16];
}

/// Random ids (UUID version 4).
#[derive(Debug, Clone, Copy, Default)]
pub struct RandomIds;

impl Ids for RandomIds {
    fn token(&self) -> [u8; 16] {
        *uuid::Uuid::new_v4().as_bytes()
    }
}

/// An id for a new job: what can be kept of its name, and eight hex digits.
pub(crate) fn new_job_id(name: &str, ids: &dyn Ids) -> JobId {
    let mut slug = String::new();
    for c in name.chars() {
        let c = c.to_ascii_lowercase();
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            slug.push(c);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
        if slug.len() == MAX_SLUG {
            break;
        }
    }
    let slug = slug.trim_end_matches('-');
    let slug = if slug.is_empty() { "job" } else { slug };
    let suffix = hex(&ids.token()[..4]);
    format!("{slug}-{suffix}")
        .parse()
        .expect("a slug of letters, digits and dashes with a hex suffix is a job id")
}

/// Lowercase hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    bytes
        .iter()
        .flat_map(|byte| {
            [
                DIGITS[usize::from(byte >> 4)],
                DIGITS[usize::from(byte & 15)],
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_id_tells_the_jobs_name() {
        let id = new_job_id("Spam & Ham, first try!", &RandomIds);
        assert!(id.as_str().starts_with("spam-ham-first-try-"), "{id}");
        assert!(new_job_id("!!!", &RandomIds).as_str().starts_with("job-"));
        assert!(new_job_id(&"x".repeat(100), &RandomIds).as_str().len() < 63);
    }
}
