//! Signs of life from work that takes long and has no steps that a caller could count.

use std::{fmt, sync::Arc};

/// Called once for every batch that is evaluated and every few thousand texts that are tokenised. The default does nothing.
#[derive(Clone, Default)]
pub struct Pulse(Option<Arc<dyn Fn() + Send + Sync>>);

impl Pulse {
    /// Calls `beat` at each sign, on the thread that works.
    pub fn new(beat: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(beat)))
    }

    /// The work goes on.
    pub fn beat(&self) {
        if let Some(beat) = &self.0 {
            beat();
        }
    }
}

impl fmt::Debug for Pulse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pulse").field(&self.0.is_some()).finish()
    }
}
