//! A look at every value while the bytes pass by.

use crate::{ErrorCode, adapter::AdapterLayout, code::Refusal};

/// Partial sums of the norm, so that the compiler can use vector instructions.
const LANES: usize = 8;

/// Sees the bytes of a payload in order, in pieces that may cut through elements; refuses NaN and infinities and adds up
/// the squared norm in `f64`.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct PayloadInspector {
    elements: u64,
    /// The first bytes of an element whose end has not come yet.
    cut: [u8; 4],
    cut_bytes: usize,
    square: f64,
}

impl PayloadInspector {
    /// Before the first byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// The inspector after `bytes`.
    ///
    /// # Errors
    /// `NOT_FINITE` naming the tensor and the element of the first value that is NaN or infinite.
    pub fn then(mut self, bytes: &[u8], layout: &AdapterLayout) -> Result<Self, Refusal> {
        let mut rest = bytes;
        if self.cut_bytes > 0 {
            let (now, later) = rest.split_at(rest.len().min(4 - self.cut_bytes));
            self.cut[self.cut_bytes..][..now.len()].copy_from_slice(now);
            self.cut_bytes += now.len();
            rest = later;
            if self.cut_bytes < 4 {
                return Ok(self);
            }
            self.take(&[self.cut], layout)?;
        }
        let (whole, cut) = rest.as_chunks();
        self.take(whole, layout)?;
        self.cut[..cut.len()].copy_from_slice(cut);
        self.cut_bytes = cut.len();
        Ok(self)
    }

    /// L2 norm of the elements so far.
    pub fn norm(&self) -> f64 {
        self.square.sqrt()
    }

    fn take(&mut self, values: &[[u8; 4]], layout: &AdapterLayout) -> Result<(), Refusal> {
        let mut lanes = [0.0; LANES];
        let (groups, rest) = values.as_chunks::<LANES>();
        for group in groups {
            for (lane, bytes) in lanes.iter_mut().zip(group) {
                *lane += square(*bytes);
            }
        }
        for (lane, bytes) in lanes.iter_mut().zip(rest) {
            *lane += square(*bytes);
        }
        let sum: f64 = lanes.iter().sum();
        // Squares of finite f32 cannot overflow f64, so that only NaN and infinities make the sum infinite or NaN.
        if !sum.is_finite() {
            return Err(self.not_finite(values, layout));
        }
        self.square += sum;
        self.elements += values.len() as u64;
        Ok(())
    }

    fn not_finite(&self, values: &[[u8; 4]], layout: &AdapterLayout) -> Refusal {
        let at = values
            .iter()
            .position(|bytes| !f32::from_le_bytes(*bytes).is_finite())
            .unwrap_or(0);
        let element = self.elements + at as u64;
        let tensor = layout
            .tensor_at(element)
            .map_or("beyond the layout", |tensor| tensor.name.as_str());
        Refusal::new(
            ErrorCode::NotFinite,
            format!(
                "tensor `{tensor}` holds {} at element {element} of the payload; every value must be finite",
                values
                    .get(at)
                    .map_or(0.0, |bytes| f32::from_le_bytes(*bytes))
            ),
        )
    }
}

fn square(bytes: [u8; 4]) -> f64 {
    let value = f64::from(f32::from_le_bytes(bytes));
    value * value
}
