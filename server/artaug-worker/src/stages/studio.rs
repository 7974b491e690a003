//! The engine with the model that it has open.

use std::time::Instant;

use concord_artaug::engine::{Drawn, Engine, EngineError, Fit, Fitted, Joined, Order, Watch};
use concord_common::{Digest, error_text};

use super::{Opened, Tools};
use crate::{brake::Halt, desk::Desk};

/// The engine of a job. One thread has it.
pub(crate) struct Studio<'a> {
    engine: Box<dyn Engine>,
    desk: &'a Desk<'a>,
    opened: Opened,
    tools: &'a Tools,
}

impl<'a> Studio<'a> {
    /// An engine with what it has open.
    pub(crate) fn new(
        engine: Box<dyn Engine>,
        opened: Opened,
        desk: &'a Desk<'a>,
        tools: &'a Tools,
    ) -> Self {
        Self {
            engine,
            desk,
            opened,
            tools,
        }
    }

    /// Opens the base with a joined `LoRA` out of the store.
    pub(crate) fn open(&mut self, joined: Option<Digest>) -> Result<(), Halt> {
        if self.opened == Opened::Model(joined) {
            return Ok(());
        }
        let bytes = joined.map(|digest| self.desk.object(digest)).transpose()?;
        self.opened = Opened::Nothing;
        let opened = self.engine.open(bytes.as_deref());
        // Afterwards, so that what came in between is seen, and before the engine is blamed.
        if !(self.tools.untouched)() {
            self.check_base()?;
        }
        opened.map_err(|error| self.halt(error))?;
        self.opened = Opened::Model(joined);
        Ok(())
    }

    /// Makes sure that the base model's folder holds what it held when this worker took the job up: the engine opens its files by name, images of
    /// different models must not be compared, and some of the files become part of a result.
    pub(crate) fn check_base(&self) -> Result<(), Halt> {
        let desk = self.desk;
        desk.check()?;
        let (known, found) = (&self.tools.card.base_files, (self.tools.base)());
        let found = found.map_err(|error| desk.trouble(error_text(&error)))?;
        let gone = known.iter().filter(|file| !found.contains(file));
        let strange = found.iter().filter(|file| !known.contains(file));
        match gone.chain(strange).next() {
            None => Ok(()),
            Some((name, _)) => Err(desk.trouble(format!(
                "{name} in the model's folder is not what it was when this worker took the job up, so nothing is made with it; put back what the job \
                 began with, or start the job anew"
            ))),
        }
    }

    /// Draws a batch with the model that is open; gives the seconds that it took too.
    pub(crate) fn draw(&mut self, orders: &[Order]) -> Result<(Drawn, f64), Halt> {
        let desk = self.desk;
        let start = Instant::now();
        let drawn = self.engine.draw(orders, &mut || desk.brake().go());
        let drawn = drawn.map_err(|error| self.halt(error))?;
        let (images, told) = (drawn.images.len(), drawn.cut.len());
        if images != orders.len() || told != orders.len() {
            return Err(desk.fail(format!(
                "the engine drew {images} images and told of {told} where {} were ordered",
                orders.len()
            )));
        }
        Ok((drawn, start.elapsed().as_secs_f64()))
    }

    /// Trains on the model that is open. What an error means is for the caller, who may have ended the fit: see [`Studio::halt`].
    pub(crate) fn fit(
        &mut self,
        fit: &Fit<'_>,
        watch: &mut dyn Watch,
    ) -> Result<Fitted, EngineError> {
        self.engine.fit(fit, watch)
    }

    /// See [`Engine::join`].
    pub(crate) fn join(&mut self, before: Option<&[u8]>, fitted: &[u8]) -> Result<Joined, Halt> {
        let joined = self.engine.join(before, fitted);
        joined.map_err(|error| self.halt(error))
    }

    /// The engine, for what needs no open model, and leaves none of which this studio would know.
    pub(crate) fn engine(&mut self) -> &mut dyn Engine {
        self.opened = Opened::Nothing;
        self.engine.as_mut()
    }

    /// What an error of the engine's means.
    pub(crate) fn halt(&self, error: EngineError) -> Halt {
        let halt = self.desk.brake().of_engine(error);
        self.desk.brake().pull(halt.clone());
        halt
    }
}
