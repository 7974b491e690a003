//! Pairs of an ArtAug job as operators write them, and what an operator's words come to.

use std::{collections::BTreeSet, fmt, ops::RangeInclusive, str::FromStr};

use super::CliError;

/// Numbers and ranges of pairs: `1,2,5-9`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pairs(Vec<RangeInclusive<u32>>);

impl FromStr for Pairs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |digits: &str| {
            digits
                .trim()
                .parse::<u32>()
                .map_err(|_| format!("`{digits}` is no pair's number; say it like 1,2,5-9"))
        };
        let part = |part: &str| match part.split_once('-') {
            None => number(part).map(|only| only..=only),
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first > last {
                    return Err(format!("`{part}` is empty; say {last}-{first}"));
                }
                Ok(first..=last)
            }
        };
        text.split(',')
            .map(part)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl Pairs {
    /// The pairs meant: each single number, whether it waits or not, and of a range those that wait.
    fn among(&self, waiting: &BTreeSet<u32>) -> Result<BTreeSet<u32>, CliError> {
        let mut chosen = BTreeSet::new();
        for range in &self.0 {
            if range.start() == range.end() {
                chosen.insert(*range.start());
                continue;
            }
            let mut inside = waiting.range(range.clone()).peekable();
            if inside.peek().is_none() {
                return Err(CliError::Usage(format!(
                    "no pair of {}-{} waits for a word; these do: {}",
                    range.start(),
                    range.end(),
                    Ranges(waiting)
                )));
            }
            chosen.extend(inside);
        }
        Ok(chosen)
    }
}

/// What is to become of the pairs that no list names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// They go on waiting.
    Wait,
    /// They are trained on.
    Accept,
    /// They are left out.
    Reject,
}

/// An operator's words.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words<'a> {
    /// Pairs to train on.
    pub(super) accept: Option<&'a Pairs>,
    /// Pairs to leave out.
    pub(super) reject: Option<&'a Pairs>,
    /// All others.
    pub(super) rest: Rest,
}

/// The words pair by pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Decided {
    /// Pairs to train on.
    pub(super) accepted: BTreeSet<u32>,
    /// Pairs to leave out.
    pub(super) rejected: BTreeSet<u32>,
}

impl Words<'_> {
    /// True if nothing was said: the operator only wants to look.
    pub(super) fn are_none(&self) -> bool {
        self.names_none() && self.rest == Rest::Wait
    }

    /// True if no pair is named; the rest may be.
    pub(super) fn names_none(&self) -> bool {
        self.accept.is_none() && self.reject.is_none()
    }

    /// The words for the pairs that wait. Whether a single number waits is left to the server, which knows.
    pub(super) fn decide(&self, waiting: &BTreeSet<u32>) -> Result<Decided, CliError> {
        let chosen = |pairs: Option<&Pairs>| {
            pairs.map_or_else(|| Ok(BTreeSet::new()), |pairs| pairs.among(waiting))
        };
        let (mut accepted, mut rejected) = (chosen(self.accept)?, chosen(self.reject)?);
        let both: BTreeSet<u32> = accepted.intersection(&rejected).copied().collect();
        if !both.is_empty() {
            return Err(CliError::Usage(format!(
                "both --accept and --reject name {}; say one of them for each pair",
                Ranges(&both)
            )));
        }
        let rest: Vec<u32> = waiting
            .iter()
            .filter(|pair| !accepted.contains(pair) && !rejected.contains(pair))
            .copied()
            .collect();
        match self.rest {
            Rest::Wait => {}
            Rest::Accept => accepted.extend(rest),
            Rest::Reject => rejected.extend(rest),
        }
        Ok(Decided { accepted, rejected })
    }
}

/// Shows numbers as [`Pairs`] takes them: `0-3,7`.
pub(super) struct Ranges<'a>(pub(super) &'a BTreeSet<u32>);

impl fmt::Display for Ranges<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.0.iter().copied().peekable();
        if numbers.peek().is_none() {
            return f.write_str("none");
        }
        let mut separator = "";
        while let Some(first) = numbers.next() {
            let mut last = first;
            while let Some(next) = numbers.next_if(|next| *next - last == 1) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{separator}{first}")?,
                _ => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(numbers: &[u32]) -> BTreeSet<u32> {
        numbers.iter().copied().collect()
    }

    fn decide(accept: &str, reject: &str, rest: Rest) -> Result<Decided, String> {
        let pairs = |text: &str| (!text.is_empty()).then(|| text.parse::<Pairs>().unwrap());
        let (accept, reject) = (pairs(accept), pairs(reject));
        let words = Words {
            accept: accept.as_ref(),
            reject: reject.as_ref(),
            rest,
        };
        words
            .decide(&set(&[0, 1, 4, 6, 7, 20]))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_range_means_those_of_it_that_wait() {
        let decided = decide("0,5-9", "", Rest::Wait).unwrap();
        assert_eq!(decided.accepted, set(&[0, 6, 7]));
        assert_eq!(decided.rejected, set(&[]));
        let all = decide("", "0-4294967295", Rest::Wait).unwrap();
        assert_eq!(all.rejected, set(&[0, 1, 4, 6, 7, 20]));
    }

    #[test]
    fn the_rest_is_what_no_list_names() {
        let decided = decide("1,4", "20", Rest::Reject).unwrap();
        assert_eq!(decided.accepted, set(&[1, 4]));
        assert_eq!(decided.rejected, set(&[0, 6, 7, 20]));
        let decided = decide("", "", Rest::Accept).unwrap();
        assert_eq!(decided.accepted, set(&[0, 1, 4, 6, 7, 20]));
    }

    #[test]
    fn a_single_number_that_does_not_wait_is_the_servers_to_refuse() {
        let decided = decide("3", "", Rest::Wait).unwrap();
        assert_eq!(decided.accepted, set(&[3]));
    }

    #[test]
    fn a_range_in_which_nothing_waits_and_a_pair_in_both_lists_are_named() {
        let error = decide("8-19", "", Rest::Wait).unwrap_err();
        assert!(
            error.contains("8-19") && error.contains("0-1,4,6-7,20"),
            "{error}"
        );
        let error = decide("0-5", "4", Rest::Wait).unwrap_err();
        assert!(error.contains(" 4;"), "{error}");
    }

    #[test]
    fn what_is_no_list_of_pairs_is_refused_with_the_way_to_write_it() {
        for text in ["", "1,", "a", "1-", "-3", "9-5", "4294967296", "1 2"] {
            assert!(text.parse::<Pairs>().is_err(), "{text}");
        }
        assert!(" 1, 5-9 ".parse::<Pairs>().is_ok());
    }
}
