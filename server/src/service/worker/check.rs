//! Everything that comes from a worker is checked here, before a transaction looks at it.

use std::collections::BTreeSet;

use concord_common::{Digest, ErrorCode, code::Refusal, job::artaug::stays_below, wire};
use concord_proto::v1::{self, JobRelease};

use super::Grip;
use crate::decide::workers::Release;

/// Kinds of jobs in a claim, and the longest text in it.
const MAX_KINDS: usize = 16;
const MAX_TEXT: usize = 64;
/// Lines of one call.
const MAX_LINES: usize = 1000;
/// Bytes of one call's lines together.
pub(super) const MAX_LINE_BYTES: usize = 1 << 20;
/// Digests of one call.
const MAX_DIGESTS: usize = 1000;
/// Longest name of an artefact in bytes.
const MAX_NAME: usize = 200;
/// Longest reason of a failure in bytes.
const MAX_REASON: usize = 1024;
/// Most pairs that wait for a word.
const MAX_WAITING: usize = 10_000;
/// Most images in a sign of life.
const MAX_IMAGES: usize = 4;
/// Longest name of a stage.
const MAX_STAGE: usize = 32;

pub(super) fn claim(request: &v1::ClaimJobRequest) -> Result<(), Refusal> {
    if !(1..=MAX_KINDS).contains(&request.kinds.len())
        || request.kinds.iter().any(|kind| kind.len() > MAX_TEXT)
    {
        let problem = format!("must be 1 to {MAX_KINDS} names of at most {MAX_TEXT} bytes");
        return Err(wire::invalid_field("kinds", problem));
    }
    if request.version.len() > MAX_TEXT || request.version.chars().any(char::is_control) {
        let problem = format!("must be at most {MAX_TEXT} printable bytes");
        return Err(wire::invalid_field("version", problem));
    }
    Ok(())
}

pub(super) fn grip(grip: Option<v1::JobGrip>, worker: String) -> Result<Grip, Refusal> {
    let grip = wire::required("grip", grip)?;
    Ok(Grip {
        job_id: wire::job_id(&grip.job_id)?,
        token: grip
            .token
            .as_slice()
            .try_into()
            .map_err(|_| wire::invalid_field("token", "must have 16 bytes"))?,
        worker,
    })
}

pub(super) fn progress(progress: Option<&v1::ArtaugProgress>) -> Result<(), Refusal> {
    let Some(progress) = progress else {
        return Ok(());
    };
    let invalid = |problem: &str| Err(wire::invalid_field("progress", problem));
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte == b'-';
    if progress.stage.len() > MAX_STAGE || !progress.stage.bytes().all(plain) {
        return invalid("`stage` must be at most 32 lowercase letters and dashes");
    }
    if !progress.per_second.is_finite() || progress.per_second < 0.0 {
        return invalid("`per_second` must be a number from 0 on");
    }
    if let Some(remaining) = &progress.remaining {
        wire::duration_from_proto("remaining", remaining)?;
    }
    if progress.last_images.len() > MAX_IMAGES {
        return invalid("`last_images` must be at most 4");
    }
    for digest in &progress.last_images {
        wire::digest("last_images", digest)?;
    }
    Ok(())
}

pub(super) fn lines(lines: &[Vec<u8>]) -> Result<(), Refusal> {
    let bytes: usize = lines.iter().map(Vec::len).sum();
    let problem = if !(1..=MAX_LINES).contains(&lines.len()) {
        format!("must be 1 to {MAX_LINES}")
    } else if bytes > MAX_LINE_BYTES {
        format!("have {bytes} bytes together, at most {MAX_LINE_BYTES} are allowed")
    } else if lines
        .iter()
        .any(|line| line.is_empty() || line.contains(&b'\n'))
    {
        "must not be empty nor hold a newline".to_owned()
    } else {
        return Ok(());
    };
    Err(wire::invalid_field("lines", problem))
}

pub(super) fn digests(digests: &[Vec<u8>]) -> Result<BTreeSet<Digest>, Refusal> {
    if digests.len() > MAX_DIGESTS {
        let problem = format!("must be at most {MAX_DIGESTS}");
        return Err(wire::invalid_field("digests", problem));
    }
    digests
        .iter()
        .map(|digest| wire::digest("digests", digest))
        .collect()
}

/// Names become paths on the disks of operators.
pub(super) fn artefact_name(name: &str) -> Result<(), Refusal> {
    let canonical = name.split('/').all(|part| {
        !part.is_empty() && !part.starts_with(['.', '-']) && !part.ends_with(['.', ' '])
    });
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    if name.len() <= MAX_NAME && canonical && name.chars().all(plain) && stays_below(name) {
        return Ok(());
    }
    let problem = format!(
        "must be a relative path of at most {MAX_NAME} bytes in names of letters, digits, `.`, `_` and `-` that do not begin or \
         end with a dot, nor begin with a dash"
    );
    Err(wire::invalid_field("name", problem))
}

pub(super) fn release(request: &v1::ReleaseJobRequest) -> Result<Release, Refusal> {
    progress(request.progress.as_ref())?;
    match request.release() {
        JobRelease::Succeeded => Ok(Release::Succeeded),
        JobRelease::Failed => Ok(Release::Failed {
            reason: reason(&request.reason)?,
        }),
        JobRelease::Stopped => Ok(Release::Stopped {
            trouble: line(&request.reason)?,
        }),
        JobRelease::Paused => Ok(Release::Paused),
        JobRelease::WaitsForReview => review(request),
        JobRelease::Unspecified => Err(wire::invalid_field("release", "is missing")),
    }
}

fn reason(text: &str) -> Result<String, Refusal> {
    Ok(line(text)?
        .unwrap_or_else(|| "the worker could not finish it; its log has the details".to_owned()))
}

/// A reason, if one was given.
fn line(text: &str) -> Result<Option<String>, Refusal> {
    if text.len() > MAX_REASON || text.chars().any(char::is_control) {
        let problem = format!("must be one line of at most {MAX_REASON} bytes");
        return Err(wire::invalid_field("reason", problem));
    }
    let text = text.trim();
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

fn review(request: &v1::ReleaseJobRequest) -> Result<Release, Refusal> {
    let waiting: BTreeSet<u32> = request.waiting.iter().copied().collect();
    if !(1..=MAX_WAITING).contains(&request.waiting.len()) || waiting.len() != request.waiting.len()
    {
        let problem = format!("must be 1 to {MAX_WAITING} different pairs");
        return Err(wire::invalid_field("waiting", problem));
    }
    let iteration = request.progress.as_ref().map_or(0, |now| now.iteration);
    if iteration == 0 {
        return Err(Refusal::new(
            ErrorCode::InvalidRequest,
            "`progress`: must tell the iteration of the pairs that wait",
        ));
    }
    Ok(Release::Review { iteration, waiting })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artefact_has_a_plain_relative_name() {
        for good in ["gallery.html", "lora/merged.safetensors", "a/b-c_d/e.1"] {
            artefact_name(good).unwrap();
        }
        let long = "x".repeat(MAX_NAME + 1);
        for bad in [
            "",
            "/etc/passwd",
            "../up",
            "a/../b",
            "a//b",
            "a/",
            ".hidden",
            "a/.b",
            "a b",
            "a\\b",
            "a\0b",
            "naïve",
            "end.",
            "-x",
            "a/-x",
            &long,
        ] {
            assert!(artefact_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_sign_of_life_is_bounded() {
        let good = v1::ArtaugProgress {
            stage: "train-first".to_owned(),
            per_second: 0.5,
            last_images: vec![vec![0; 32]; 4],
            ..v1::ArtaugProgress::default()
        };
        progress(Some(&good)).unwrap();
        progress(None).unwrap();
        let bad = [
            v1::ArtaugProgress {
                stage: "x".repeat(33),
                ..good.clone()
            },
            v1::ArtaugProgress {
                stage: "\u{1b}[2J".to_owned(),
                ..good.clone()
            },
            v1::ArtaugProgress {
                per_second: f64::NAN,
                ..good.clone()
            },
            v1::ArtaugProgress {
                last_images: vec![vec![0; 32]; 5],
                ..good.clone()
            },
            v1::ArtaugProgress {
                last_images: vec![vec![0; 31]],
                ..good.clone()
            },
            v1::ArtaugProgress {
                remaining: Some(prost_types::Duration {
                    seconds: -1,
                    nanos: 0,
                }),
                ..good.clone()
            },
        ];
        for progress in bad {
            assert!(super::progress(Some(&progress)).is_err(), "{progress:?}");
        }
    }

    #[test]
    fn lines_of_one_call_are_bounded() {
        lines(&[vec![b'x'; MAX_LINE_BYTES]]).unwrap();
        lines(&vec![b"{}".to_vec(); MAX_LINES]).unwrap();
        for bad in [
            vec![],
            vec![vec![]],
            vec![b"a\nb".to_vec()],
            vec![vec![b'x'; MAX_LINE_BYTES], b"y".to_vec()],
            vec![b"{}".to_vec(); MAX_LINES + 1],
        ] {
            assert!(lines(&bad).is_err());
        }
    }
}
