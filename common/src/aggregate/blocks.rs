//! The walk over payloads that every rule shares: read, add to the base, round, check, hash, write.
//!
//! Blocks of [`BLOCK_ELEMENTS`] are computed in parallel, a group at a time, while the group before is hashed and written
//! in order. Every element's arithmetic happens in one place and in one order, so that the number of threads does not
//! show in the result. At most 2 [`GROUP_BLOCKS`] blocks are in memory, each with [`BLOCK_ELEMENTS`] * 16 bytes: 16 MiB at
//! the most, whatever the size of the contributions. A contribution more costs 8 bytes a block for its norm.

use std::io;

use rayon::prelude::*;

use super::{Aggregate, AggregateError, Aggregation, PayloadSource, Whose};
use crate::adapter::{AdapterVersion, ELEMENT_BYTES};

/// Elements of a block.
pub const BLOCK_ELEMENTS: usize = 16 * 1024;
/// Most blocks that are computed in one go.
pub const GROUP_BLOCKS: usize = 32;
/// Blocks per thread in a group: enough to even out their differences.
const BLOCKS_PER_THREAD: usize = 4;
/// Partial sums of a norm, so that the compiler can use vector instructions; part of the definition of the result.
const LANES: usize = 8;

/// One block of every contribution, as a rule sees it.
pub(super) struct Block<'a> {
    inputs: &'a Inputs<'a>,
    first: u64,
    raw: &'a mut [u8],
    squares: &'a mut [f64],
}

impl Block<'_> {
    /// Adds `weight` times the block of contribution `index` (in silo-id order) to `sum`.
    pub(super) fn add(
        &mut self,
        index: usize,
        weight: f64,
        sum: &mut [f64],
    ) -> Result<(), AggregateError> {
        let values = self.inputs.read(index + 1, self.first, self.raw)?;
        self.squares[index] = add_scaled(sum, weight, values);
        Ok(())
    }
}

/// The base (at 0) and the contributions, in order.
struct Inputs<'a> {
    sources: Vec<(Whose, &'a dyn PayloadSource)>,
}

impl<'a> Inputs<'a> {
    fn of(work: &Aggregation<'a>) -> Result<Self, AggregateError> {
        let updates = work
            .updates
            .iter()
            .map(|(silo, update)| (Whose::Silo(silo.clone()), update.delta));
        let sources: Vec<_> = std::iter::once((Whose::Base, work.base))
            .chain(updates)
            .collect();
        let want = work.layout.payload_bytes();
        for (whose, source) in &sources {
            let got = source.size().map_err(|source| AggregateError::Read {
                whose: whose.clone(),
                offset: 0,
                source,
            })?;
            if got != want {
                return Err(AggregateError::Size {
                    whose: whose.clone(),
                    got,
                    want,
                });
            }
        }
        Ok(Self { sources })
    }

    fn read<'b>(
        &self,
        index: usize,
        first: u64,
        raw: &'b mut [u8],
    ) -> Result<&'b [[u8; 4]], AggregateError> {
        let (whose, source) = &self.sources[index];
        let offset = first * ELEMENT_BYTES;
        source
            .read_at(offset, raw)
            .map_err(|source| AggregateError::Read {
                whose: whose.clone(),
                offset,
                source,
            })?;
        Ok(raw.as_chunks().0)
    }

    /// Says which input made element `element` of the result NaN or infinite.
    fn blame(&self, work: &Aggregation<'_>, element: u64) -> AggregateError {
        let tensor = work
            .layout
            .tensor_at(element)
            .map_or_else(String::new, |tensor| tensor.name.clone());
        let mut raw = [0; 4];
        for (index, (whose, _)) in self.sources.iter().enumerate() {
            if let Err(error) = self.read(index, element, &mut raw) {
                return error;
            }
            if !decode(raw).is_finite() {
                return AggregateError::NotFinite {
                    whose: whose.clone(),
                    tensor,
                    element,
                };
            }
        }
        AggregateError::Overflow { tensor, element }
    }
}

/// The memory of one block and what was computed in it.
struct Slot {
    raw: Vec<u8>,
    step: Vec<f64>,
    output: Vec<u8>,
    step_square: f64,
    update_squares: Vec<f64>,
    failure: Option<AggregateError>,
}

impl Slot {
    fn new(elements: usize, updates: usize) -> Self {
        Self {
            raw: vec![0; elements * 4],
            step: vec![0.0; elements],
            output: vec![0; elements * 4],
            step_square: 0.0,
            update_squares: vec![0.0; updates],
            failure: None,
        }
    }

    fn compute<F>(
        &mut self,
        work: &Aggregation<'_>,
        inputs: &Inputs<'_>,
        first: u64,
        rule: &F,
    ) -> Result<(), AggregateError>
    where
        F: Fn(&mut Block<'_>, &mut [f64]) -> Result<(), AggregateError> + Sync,
    {
        let left = work.layout.elements() - first;
        let elements = self.step.capacity().min(left as usize);
        self.raw.resize(elements * 4, 0);
        self.output.resize(elements * 4, 0);
        self.step.clear();
        self.step.resize(elements, 0.0);
        let mut block = Block {
            inputs,
            first,
            raw: &mut self.raw,
            squares: &mut self.update_squares,
        };
        rule(&mut block, &mut self.step)?;
        self.step_square = sum_of_squares(&self.step);
        let base = inputs.read(0, first, &mut self.raw)?;
        let mut finite = true;
        for ((output, base), step) in self
            .output
            .as_chunks_mut()
            .0
            .iter_mut()
            .zip(base)
            .zip(&self.step)
        {
            let value = (f64::from(decode(*base)) + step) as f32;
            finite &= value.is_finite();
            *output = value.to_le_bytes();
        }
        if finite {
            return Ok(());
        }
        let at = self
            .output
            .as_chunks()
            .0
            .iter()
            .position(|bytes| !decode(*bytes).is_finite())
            .unwrap_or(0);
        Err(inputs.blame(work, first + at as u64))
    }
}

/// Computes `base + step` for the step that `rule` adds up, block by block, into `sink`.
///
/// `rule` gets a block and its step (zeros), and must read every contribution once.
pub(super) fn run<F>(
    work: &Aggregation<'_>,
    sink: &mut dyn io::Write,
    rule: &F,
) -> Result<Aggregate, AggregateError>
where
    F: Fn(&mut Block<'_>, &mut [f64]) -> Result<(), AggregateError> + Sync,
{
    let inputs = Inputs::of(work)?;
    let total = work.layout.elements();
    let block = BLOCK_ELEMENTS.min(total as usize);
    let blocks = total.div_ceil(block as u64);
    let width = (rayon::current_num_threads() * BLOCKS_PER_THREAD)
        .min(GROUP_BLOCKS)
        .min(blocks as usize);
    let new_group = || -> Vec<Slot> {
        (0..width)
            .map(|_| Slot::new(block, work.updates.len()))
            .collect()
    };
    let compute = |group: &mut [Slot], first_block: u64| {
        let left = (blocks - first_block).min(width as u64) as usize;
        group[..left]
            .par_iter_mut()
            .enumerate()
            .for_each(|(index, slot)| {
                let first = (first_block + index as u64) * block as u64;
                slot.failure = slot.compute(work, &inputs, first, rule).err();
            });
    };
    let mut output = Output::new(sink, work.updates.len());
    let (mut done, mut next) = (new_group(), new_group());
    compute(&mut done, 0);
    let mut first_block = 0;
    loop {
        let ready = (blocks - first_block).min(width as u64) as usize;
        let following = first_block + ready as u64;
        rayon::in_place_scope(|scope| {
            if following < blocks {
                scope.spawn(|_| compute(&mut next, following));
            }
            output.take(&mut done[..ready])
        })?;
        if following == blocks {
            return Ok(output.finish(work));
        }
        std::mem::swap(&mut done, &mut next);
        first_block = following;
    }
}

/// What has been written so far.
struct Output<'a> {
    sink: &'a mut dyn io::Write,
    hasher: blake3::Hasher,
    step_square: f64,
    update_squares: Vec<f64>,
}

impl<'a> Output<'a> {
    fn new(sink: &'a mut dyn io::Write, updates: usize) -> Self {
        Self {
            sink,
            hasher: blake3::Hasher::new(),
            step_square: 0.0,
            update_squares: vec![0.0; updates],
        }
    }

    fn take(&mut self, slots: &mut [Slot]) -> Result<(), AggregateError> {
        for slot in slots {
            if let Some(failure) = slot.failure.take() {
                return Err(failure);
            }
            self.hasher.update(&slot.output);
            self.sink
                .write_all(&slot.output)
                .map_err(AggregateError::Write)?;
            self.step_square += slot.step_square;
            for (total, square) in self.update_squares.iter_mut().zip(&slot.update_squares) {
                *total += square;
            }
        }
        Ok(())
    }

    fn finish(self, work: &Aggregation<'_>) -> Aggregate {
        let norms = self.update_squares.iter().map(|square| square.sqrt());
        Aggregate {
            version: AdapterVersion(self.hasher.finalize().into()),
            step_norm: self.step_square.sqrt(),
            update_norms: work.updates.keys().cloned().zip(norms).collect(),
        }
    }
}

/// One element.
fn decode(bytes: [u8; 4]) -> f32 {
    f32::from_le_bytes(bytes)
}

/// Adds `weight * values` to `sum`, and returns the values' sum of squares. One pass, because memory is what it waits for.
fn add_scaled(sum: &mut [f64], weight: f64, values: &[[u8; 4]]) -> f64 {
    let mut lanes = [0.0; LANES];
    let mut add = |sum: &mut [f64], values: &[[u8; 4]]| {
        for ((lane, sum), bytes) in lanes.iter_mut().zip(sum).zip(values) {
            let value = f64::from(decode(*bytes));
            *sum += weight * value;
            *lane += value * value;
        }
    };
    let (sums, last_sum) = sum.as_chunks_mut::<LANES>();
    let (groups, last_group) = values.as_chunks::<LANES>();
    for (sum, group) in sums.iter_mut().zip(groups) {
        add(sum, group);
    }
    add(last_sum, last_group);
    lanes.iter().sum()
}

fn sum_of_squares(values: &[f64]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (groups, rest) = values.as_chunks::<LANES>();
    for group in groups.iter().map(<[f64; LANES]>::as_slice).chain([rest]) {
        for (lane, value) in lanes.iter_mut().zip(group) {
            *lane += value * value;
        }
    }
    lanes.iter().sum()
}
