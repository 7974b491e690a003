//! Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): the forward pass keeps what lies between blocks only; the backward pass runs each
//! block again, with a graph, when its turn comes. A level of the UNet, on its way down or up, is a block, so the largest of them bounds what is saved.

use tch::Tensor;

use super::{State, UNet};
use crate::error::LearningError;

/// The gradients of leaves that `gradients` of `outputs` give. Undefined where an output does not depend on a leaf.
///
/// # Errors
/// [`LearningError::Torch`] if shapes do not fit, [`LearningError::Data`] for no outputs.
pub fn pull_through(
    outputs: &[&Tensor],
    gradients: &[&Tensor],
    leaves: &[&Tensor],
) -> Result<Vec<Tensor>, LearningError> {
    // The derivative of this sum is what is asked for.
    let mut sum: Option<Tensor> = None;
    for (output, gradient) in outputs.iter().zip(gradients) {
        let part = output.f_mul(gradient)?.f_sum(output.kind())?;
        sum = Some(match sum {
            None => part,
            Some(sum) => sum.f_add(&part)?,
        });
    }
    let sum = sum.ok_or_else(|| {
        LearningError::Data("there is no output to pull gradients through".to_owned())
    })?;
    if !sum.requires_grad() {
        return Ok(leaves.iter().map(|_| Tensor::new()).collect());
    }
    Ok(Tensor::f_run_backward(&[sum], leaves, false, false)?)
}

/// Gradients on their way down.
struct Pull<'a> {
    leaves: &'a [&'a Tensor],
    /// By leaf.
    found: Vec<Option<Tensor>>,
    /// Of SiLU of the time's embedding.
    time: Option<Tensor>,
    /// Of the text, where it hangs on leaves itself.
    context: Option<Tensor>,
    /// Whether it does.
    reads_trained_text: bool,
}

fn add(sum: &mut Option<Tensor>, more: Tensor) -> Result<(), LearningError> {
    if more.defined() {
        *sum = Some(match sum.take() {
            None => more,
            Some(sum) => sum.f_add(&more)?,
        });
    }
    Ok(())
}

/// A copy of the handle that begins a graph of its own.
fn leaf(tensor: &Tensor) -> Result<Tensor, LearningError> {
    Ok(tensor.f_detach()?.f_set_requires_grad(true)?)
}

impl Pull<'_> {
    /// Runs a block again on `inputs` and gives their gradients.
    fn block(
        &mut self,
        state: &State,
        inputs: &[&Tensor],
        gradients: &[&Tensor],
        run: impl FnOnce(&[Tensor], &State) -> Result<Vec<Tensor>, LearningError>,
    ) -> Result<Vec<Tensor>, LearningError> {
        let inputs = inputs
            .iter()
            .map(|input| leaf(input))
            .collect::<Result<Vec<_>, _>>()?;
        let state = State {
            time: leaf(&state.time)?,
            context: if self.reads_trained_text {
                leaf(&state.context)?
            } else {
                state.context.shallow_clone()
            },
        };
        let outputs = run(&inputs, &state)?;
        let outputs: Vec<&Tensor> = outputs.iter().collect();
        let wanted: Vec<&Tensor> = inputs
            .iter()
            .chain([&state.time])
            .chain(self.reads_trained_text.then_some(&state.context))
            .chain(self.leaves.iter().copied())
            .collect();
        let mut pulled = pull_through(&outputs, gradients, &wanted)?;
        let shared = 1 + usize::from(self.reads_trained_text);
        let of_leaves = pulled.split_off(inputs.len() + shared);
        for (sum, more) in self.found.iter_mut().zip(of_leaves) {
            add(sum, more)?;
        }
        for (sum, more) in [&mut self.time, &mut self.context]
            .into_iter()
            .zip(pulled.split_off(inputs.len()))
        {
            add(sum, more)?;
        }
        Ok(pulled)
    }
}

impl UNet {
    /// The gradients of `leaves` that `output_gradient` of the output gives, with little memory. Leaves are weights or adapters of this network and, if
    /// `context` was made with a graph, whatever it hangs on: the text encoder's.
    ///
    /// # Errors
    /// As [`UNet::run`], and what `output_gradient` returns.
    pub fn pull(
        &self,
        sample: &Tensor,
        times: &Tensor,
        context: &Tensor,
        leaves: &[&Tensor],
        output_gradient: &mut dyn FnMut(&Tensor) -> Result<Tensor, LearningError>,
    ) -> Result<Vec<Tensor>, LearningError> {
        let text = context;
        let context = text.f_detach()?;
        let trace = {
            let _frozen = tch::no_grad_guard();
            self.trace(sample, times, &context)?
        };
        let mut pull = Pull {
            leaves,
            found: leaves.iter().map(|_| None).collect(),
            time: None,
            context: None,
            reads_trained_text: text.requires_grad(),
        };
        let state = &trace.state;
        let top = &trace.ups[trace.ups.len() - 1];
        let gradient = output_gradient(&trace.output)?;
        let mut of_x = first(pull.block(state, &[top], &[&gradient], |inputs, _| {
            Ok(vec![self.run_out(&inputs[0])?])
        })?)?;

        let mut of_skips: Vec<Option<Tensor>> = trace.skips.iter().map(|_| None).collect();
        // The way up read the skip connections from the last to the first.
        let mut start = 0;
        for level in (0..self.up.len()).rev() {
            let end = start + self.skips_of(level);
            let size = (start > 0)
                .then(|| trace.skips[start - 1].size4())
                .transpose()?
                .map(|(_, _, h, w)| (h, w));
            let mut inputs = vec![&trace.ups[level]];
            inputs.extend(&trace.skips[start..end]);
            let mut pulled = pull.block(state, &inputs, &[&of_x], |inputs, state| {
                let own = inputs[1..].iter().map(Tensor::shallow_clone).collect();
                let x = inputs[0].shallow_clone();
                Ok(vec![self.run_up(level, x, state, own, size)?])
            })?;
            for (sum, more) in of_skips[start..end].iter_mut().zip(pulled.drain(1..)) {
                add(sum, more)?;
            }
            of_x = first(pulled)?;
            start = end;
        }

        let bottom = &trace.skips[trace.skips.len() - 1];
        let pulled = pull.block(state, &[bottom], &[&of_x], |inputs, state| {
            Ok(vec![self.run_middle(&inputs[0], state)?])
        })?;
        let last = of_skips.len() - 1;
        add(&mut of_skips[last], first(pulled)?)?;

        let mut end = trace.skips.len();
        for level in (0..self.down.len()).rev() {
            let start = trace.downs[level];
            let gradients = of_skips[start..end]
                .iter()
                .map(|gradient| gradient.as_ref().ok_or_else(unreached))
                .collect::<Result<Vec<_>, _>>()?;
            let entered = &trace.skips[start - 1];
            let pulled = pull.block(state, &[entered], &gradients, |inputs, state| {
                let mut skips = Vec::new();
                let _last = self.run_down(level, inputs[0].shallow_clone(), state, &mut skips)?;
                Ok(skips)
            })?;
            add(&mut of_skips[start - 1], first(pulled)?)?;
            end = start;
        }

        let entered = of_skips[0].as_ref().ok_or_else(unreached)?;
        pull.block(state, &[], &[entered], |_, _| {
            Ok(vec![self.conv_in.run(sample)?])
        })?;
        self.pull_time(&mut pull, sample, times, &context)?;
        if let Some(gradient) = pull.context.take() {
            let pulled = pull_through(&[text], &[&gradient], leaves)?;
            for (sum, more) in pull.found.iter_mut().zip(pulled) {
                add(sum, more)?;
            }
        }
        Ok(pull
            .found
            .into_iter()
            .map(Option::unwrap_or_default)
            .collect())
    }

    /// The time's embedding is the one value that all blocks read.
    fn pull_time(
        &self,
        pull: &mut Pull<'_>,
        sample: &Tensor,
        times: &Tensor,
        context: &Tensor,
    ) -> Result<(), LearningError> {
        let Some(gradient) = pull.time.take() else {
            return Ok(());
        };
        let again = self.state(sample, times, context)?.time;
        let pulled = pull_through(&[&again], &[&gradient], pull.leaves)?;
        for (sum, more) in pull.found.iter_mut().zip(pulled) {
            add(sum, more)?;
        }
        Ok(())
    }

    /// A forward pass that keeps what enters every block.
    fn trace(
        &self,
        sample: &Tensor,
        times: &Tensor,
        context: &Tensor,
    ) -> Result<Trace, LearningError> {
        let state = self.state(sample, times, context)?;
        let mut x = self.conv_in.run(sample)?;
        let mut skips = vec![x.shallow_clone()];
        let mut downs = Vec::new();
        for level in 0..self.down.len() {
            downs.push(skips.len());
            x = self.run_down(level, x, &state, &mut skips)?;
        }
        x = self.run_middle(&x, &state)?;
        let mut ups = vec![x.shallow_clone()];
        let mut end = skips.len();
        for level in 0..self.up.len() {
            let start = end - self.skips_of(level);
            let own = skips[start..end]
                .iter()
                .map(Tensor::shallow_clone)
                .collect();
            let size = (start > 0)
                .then(|| skips[start - 1].size4())
                .transpose()?
                .map(|(_, _, h, w)| (h, w));
            x = self.run_up(level, x, &state, own, size)?;
            ups.push(x.shallow_clone());
            end = start;
        }
        Ok(Trace {
            output: self.run_out(&x)?,
            state,
            skips,
            downs,
            ups,
        })
    }
}

/// What a forward pass leaves between its blocks.
struct Trace {
    state: State,
    /// All skip connections; the first is what the first convolution gave, the last is what enters the middle.
    skips: Vec<Tensor>,
    /// Where every level's own skip connections begin.
    downs: Vec<usize>,
    /// What enters every level on the way up, and at last the exit.
    ups: Vec<Tensor>,
    output: Tensor,
}

fn first(pulled: Vec<Tensor>) -> Result<Tensor, LearningError> {
    pulled.into_iter().next().ok_or_else(unreached)
}

fn unreached() -> LearningError {
    LearningError::Training("a block of the network was reached by no gradient".to_owned())
}
