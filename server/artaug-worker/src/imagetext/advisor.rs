//! Advice on the subject: where an image does not show what its prompt says, the middle is asked for it.

use std::sync::Arc;

use concord_artaug::{
    advisor::{Advice, Advisor, AdvisorError, Question, Region, RegionPrompt, RejectedReply},
    words::{Dimension, Level, Place, Statement, describe},
};

use super::ImageText;

/// Another advisor's advice, and a region in the middle for images whose alignment with their prompt is low: below a given one, or below what 19 in 20
/// clean drawings reach.
///
/// The region's prompt is the image's own with the words for a clear, sharp and centred subject. It is a simple rule: it cannot say what is wrong with
/// the subject, only that little of it is recognised. So it takes the last place, and none if the other advice fills them all.
pub struct SubjectAdvisor {
    inner: Box<dyn Advisor>,
    model: Arc<ImageText>,
    low: f64,
}

impl std::fmt::Debug for SubjectAdvisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SubjectAdvisor({})", self.name())
    }
}

impl SubjectAdvisor {
    /// Adds the model's advice to that of `inner`, on images whose alignment is below `low`.
    pub fn new(inner: Box<dyn Advisor>, model: Arc<ImageText>, low: Option<f64>) -> Self {
        let low = low.unwrap_or(model.facts().low);
        Self { inner, model, low }
    }
}

/// The region for an alignment, if it is below `low`; the further below, the surer. `typical` is that of a good image.
pub(super) fn emphasis(alignment: f64, (low, typical): (f64, f64), prompt: &str) -> Option<Region> {
    if alignment >= low {
        return None;
    }
    let wishes = [
        Dimension::Contrast,
        Dimension::Sharpness,
        Dimension::Placement,
    ]
    .map(|dimension| Statement {
        dimension,
        level: Level::Good,
        place: Place::Whole,
    });
    // A prompt that is too long or strange for a region has no place in one.
    let prompt = RegionPrompt::new(&describe(prompt, &wishes)).ok()?;
    let span = (typical - low).max(1e-3);
    Some(Region {
        area: Place::Centre.area(),
        prompt,
        confidence: ((low - alignment) / span).clamp(0.05, 0.95),
    })
}

impl Advisor for SubjectAdvisor {
    fn name(&self) -> String {
        format!(
            "{}, subject below {:.3} by the image-text model {}",
            self.inner.name(),
            self.low,
            self.model.digest().short()
        )
    }

    fn advise(&self, question: &Question<'_>) -> Result<Advice, AdvisorError> {
        let mut advice = self.inner.advise(question)?;
        let alignment = match self.model.alignment(question.image, question.prompt) {
            Ok(alignment) => alignment,
            Err(error) => {
                advice.rejected_replies.push(RejectedReply {
                    raw: String::new(),
                    code: "image-text".to_owned(),
                    reason: error.to_string(),
                });
                return Err(AdvisorError::NoUsableReply(Box::new(advice)));
            }
        };
        let typical = self.model.facts().typical;
        if advice.regions.len() < question.max_regions
            && let Some(mut region) = emphasis(alignment, (self.low, typical), question.prompt)
        {
            // Measured faults come first: they say where they are.
            if let Some(last) = advice.regions.last() {
                region.confidence = region.confidence.min(last.confidence);
            }
            advice.regions.push(region);
        }
        Ok(advice)
    }
}
