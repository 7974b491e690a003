//! Advice as one prompt for the whole image: the control arm "prompt rewriting alone", which costs no regional predictions.

use super::Region;
use crate::words::Place;

/// Longest rewritten prompt in bytes; further regions are left out.
const MAX_REWRITTEN: usize = 1000;

/// The prompt with what each region asks for after it, and where in words: "red apple, well lit on the left".
pub fn rewrite(prompt: &str, regions: &[Region]) -> String {
    let mut rewritten = prompt.to_owned();
    for region in regions {
        let own = region.prompt.as_str();
        // Region prompts usually repeat the subject.
        let wish = own.strip_prefix(prompt).unwrap_or(own);
        let wish =
            wish.trim_matches(|character: char| character == ',' || character.is_whitespace());
        let place = Place::nearest(region.area).words();
        let addition = format!(", {}", format!("{wish} {place}").trim());
        if wish.is_empty() || rewritten.len() + addition.len() > MAX_REWRITTEN {
            continue;
        }
        rewritten.push_str(&addition);
    }
    rewritten
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{advisor::RegionPrompt, region::Area};

    fn region(place: Place, prompt: &str) -> Region {
        Region {
            area: place.area(),
            prompt: RegionPrompt::new(prompt).unwrap(),
            confidence: 0.5,
        }
    }

    #[test]
    fn wishes_follow_the_prompt_with_their_places() {
        let regions = [
            region(Place::Left, "red apple, well lit"),
            region(Place::Whole, "red apple, colourful, sharp"),
            region(Place::Top, "a clear sky"),
            region(Place::Centre, "red apple"),
        ];
        assert_eq!(
            rewrite("red apple", &regions),
            "red apple, well lit on the left, colourful, sharp, a clear sky at the top"
        );
        assert_eq!(rewrite("red apple", &[]), "red apple");
    }

    #[test]
    fn a_rewritten_prompt_stays_within_its_length() {
        let long = region(Place::Whole, &"a".repeat(200));
        let regions = vec![long; 16];
        assert!(rewrite("x", &regions).len() <= MAX_REWRITTEN);
        assert_eq!(regions[0].area, Area::WHOLE);
    }
}
