//! LoRA files. diffusers: `unet.<layer>.lora_A.weight` and `.lora_B.weight`, or the older `.lora.down.weight` and `.lora.up.weight`, with peft's
//! settings in the metadata. kohya: `lora_unet_<layer with _>.lora_down.weight`, `.lora_up.weight` and `.alpha`.
//!
//! `diffusers` 0.42 writes attention layers with the older names and all others with peft's, but loads only the latter from such a file; so what is
//! written here has peft's names throughout.
//!
//! A file must be understood to the last tensor: what matches no layer of the model is an error.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use super::{Lora, Pair};
use crate::{
    diffusion::{files, params::shortened},
    error::LearningError,
    weights::WeightsFile,
};

/// How a file names its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// What `load_lora_weights` of `diffusers` reads. Scales go into B: without settings it takes alpha for the rank.
    Diffusers,
    /// What kohya's scripts and most user interfaces read.
    Kohya,
}

/// A layer of the model that a file may speak of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Its name (`unet.…`).
    pub name: String,
    /// Whether it is stored as a convolution of one pixel.
    pub pixel: bool,
}

/// The three things that a file says of a layer.
#[derive(Default)]
struct Found {
    down: Option<Tensor>,
    up: Option<Tensor>,
    alpha: Option<f64>,
}

#[derive(Clone, Copy)]
enum Part {
    Down,
    Up,
    Alpha,
}

impl Found {
    /// Takes a tensor in; what is wrong with it, if something is.
    fn take(&mut self, part: Part, tensor: &Tensor) -> Result<Option<String>, LearningError> {
        let float = matches!(
            tensor.kind(),
            Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double
        );
        if !float || tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            return Ok(Some("not finite numbers".to_owned()));
        }
        let second = match part {
            Part::Alpha => {
                if tensor.numel() != 1 {
                    return Ok(Some("not one number".to_owned()));
                }
                let value = tensor.f_to_kind(Kind::Double)?.f_reshape([1])?;
                self.alpha.replace(value.f_double_value(&[0])?).is_some()
            }
            Part::Down | Part::Up => {
                let Some(matrix) = matrix(tensor)? else {
                    return Ok(Some(format!("shape {:?}", tensor.size())));
                };
                let slot = match part {
                    Part::Down => &mut self.down,
                    _ => &mut self.up,
                };
                slot.replace(matrix).is_some()
            }
        };
        Ok(second.then(|| "a second spelling".to_owned()))
    }

    /// Both halves. The scale is from the file's own alpha, else what peft was told, else 1 (alpha = rank).
    fn pair(self, told: Option<f64>) -> Result<Pair, String> {
        let (Some(down), Some(up)) = (self.down, self.up) else {
            return Err("one half of a pair".to_owned());
        };
        let rank = down.size()[0];
        if rank < 1 || up.size()[1] != rank {
            return Err(format!(
                "halves of shapes {:?} and {:?}",
                down.size(),
                up.size()
            ));
        }
        let scale = self
            .alpha
            .map(|alpha| alpha / rank as f64)
            .or(told)
            .unwrap_or(1.0);
        Ok(Pair { down, up, scale })
    }
}

/// Where diffusers keeps what peft was told: JSON in the file's metadata.
const SETTINGS: &str = "lora_adapter_metadata";

/// Settings of peft that change what a pair means.
const UNSUPPORTED: [&str; 4] = ["use_dora", "use_rslora", "use_qalora", "use_bdlora"];

const ENDS: [(&str, Part); 9] = [
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".alpha", Part::Alpha),
];

/// All spellings of a layer's name in files.
fn spellings(name: &str) -> Vec<String> {
    let mut found = vec![name.to_owned()];
    let kohya = |prefix: &str, rest: &str| format!("{prefix}_{}", rest.replace('.', "_"));
    if let Some(rest) = name.strip_prefix("unet.") {
        found.push(kohya("lora_unet", rest));
    }
    if let Some(rest) = name.strip_prefix("text_encoder.") {
        found.push(format!("text_encoder.text_model.{rest}"));
        found.push(kohya("lora_te_text_model", rest));
        found.push(kohya("lora_te", rest));
    }
    found
}

/// Scales by component (`unet`, `text_encoder`) from the file's settings.
fn scales(weights: &WeightsFile) -> Result<BTreeMap<String, f64>, String> {
    let Some(text) = weights.note(SETTINGS) else {
        return Ok(BTreeMap::new());
    };
    let settings: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| format!("{SETTINGS}: {error}"))?;
    let mut found = BTreeMap::new();
    for component in ["unet", "text_encoder"] {
        let at = |field: &str| settings.get(&format!("{component}.{field}"));
        let number = |field: &str| at(field).and_then(Value::as_f64);
        for field in UNSUPPORTED {
            if at(field).is_some_and(|value| value.as_bool() != Some(false) && !value.is_null()) {
                return Err(format!("{SETTINGS}: {component}.{field} is not supported"));
            }
        }
        for field in ["alpha_pattern", "rank_pattern"] {
            let filled = |value: &Value| value.as_object().is_some_and(|map| !map.is_empty());
            if at(field).is_some_and(filled) {
                return Err(format!("{SETTINGS}: {component}.{field} is not supported"));
            }
        }
        if let (Some(alpha), Some(rank)) = (number("lora_alpha"), number("r"))
            && rank > 0.0
        {
            found.insert(component.to_owned(), alpha / rank);
        }
    }
    Ok(found)
}

impl Lora {
    /// Reads a file in either layout for a model with these layers.
    ///
    /// # Errors
    /// [`LearningError::Io`], or one [`LearningError::Weights`] that names every tensor that matches no layer or lacks its partner, or is of a wrong
    /// shape.
    pub fn read(file: &Path, layers: &[Written]) -> Result<Self, LearningError> {
        let weights = WeightsFile::open(file)?;
        let known: BTreeMap<String, &str> = layers
            .iter()
            .flat_map(|layer| {
                spellings(&layer.name)
                    .into_iter()
                    .map(|spelling| (spelling, layer.name.as_str()))
            })
            .collect();
        let settings = scales(&weights).map_err(|reason| LearningError::weights(file, reason))?;
        let mut found: BTreeMap<&str, Found> = BTreeMap::new();
        let mut strangers = Vec::new();
        let mut wrong = Vec::new();
        for stored in weights.names() {
            let place = ENDS.iter().find_map(|(end, part)| {
                let layer = known.get(stored.strip_suffix(end)?)?;
                Some((*layer, *part))
            });
            let Some((layer, part)) = place else {
                strangers.push(stored);
                continue;
            };
            let tensor = weights.tensor(&stored)?;
            let entry = found.entry(layer).or_default();
            if let Some(complaint) = entry.take(part, &tensor)? {
                wrong.push(format!("{stored} ({complaint})"));
            }
        }
        let mut pairs = BTreeMap::new();
        for (layer, parts) in found {
            let component = layer.split('.').next().unwrap_or_default();
            match parts.pair(settings.get(component).copied()) {
                Ok(pair) => {
                    pairs.insert(layer.to_owned(), pair);
                }
                Err(complaint) => wrong.push(format!("{layer} ({complaint})")),
            }
        }
        let mut reasons = Vec::new();
        if !strangers.is_empty() {
            reasons.push(format!(
                "{} tensors match no layer of the model: {}",
                strangers.len(),
                shortened(&strangers)
            ));
        }
        if !wrong.is_empty() {
            reasons.push(format!(
                "{} tensors cannot be used: {}",
                wrong.len(),
                shortened(&wrong)
            ));
        }
        if reasons.is_empty() && pairs.is_empty() {
            reasons.push("it holds no pair".to_owned());
        }
        if reasons.is_empty() {
            Ok(Self { pairs })
        } else {
            Err(LearningError::weights(file, reasons.join("; ")))
        }
    }

    /// Writes a file; `notes` go into its metadata.
    ///
    /// # Errors
    /// [`LearningError::Config`] if a layer is not among `layers`, [`LearningError::Io`].
    pub fn write(
        &self,
        file: &Path,
        layout: Layout,
        layers: &[Written],
        notes: &[(&str, &str)],
    ) -> Result<(), LearningError> {
        let mut tensors = BTreeMap::new();
        let pixels: BTreeSet<&str> = layers
            .iter()
            .filter(|layer| layer.pixel)
            .map(|layer| layer.name.as_str())
            .collect();
        for (name, pair) in &self.pairs {
            if !layers.iter().any(|layer| &layer.name == name) {
                return Err(LearningError::Config(format!(
                    "the LoRA has a pair for {name}, which is no layer of the model"
                )));
            }
            let shaped = |tensor: Tensor| -> Result<Tensor, LearningError> {
                Ok(if pixels.contains(name.as_str()) {
                    tensor.f_unsqueeze(-1)?.f_unsqueeze(-1)?
                } else {
                    tensor
                })
            };
            let down = shaped(pair.down.shallow_clone())?;
            match layout {
                Layout::Diffusers => {
                    let up = shaped(pair.up.f_mul_scalar(pair.scale)?)?;
                    let stem = name.replacen("text_encoder.", "text_encoder.text_model.", 1);
                    tensors.insert(format!("{stem}.lora_A.weight"), down);
                    tensors.insert(format!("{stem}.lora_B.weight"), up);
                }
                Layout::Kohya => {
                    let stem = kohya_stem(name)?;
                    let alpha = pair.scale * pair.down.size()[0] as f64;
                    tensors.insert(format!("{stem}.lora_down.weight"), down);
                    tensors.insert(
                        format!("{stem}.lora_up.weight"),
                        shaped(pair.up.shallow_clone())?,
                    );
                    tensors.insert(
                        format!("{stem}.alpha"),
                        Tensor::f_from_slice(&[alpha as f32])?.f_reshape([0_i64; 0])?,
                    );
                }
            }
        }
        files::write_weights(file, &tensors, notes)
    }
}

fn kohya_stem(name: &str) -> Result<String, LearningError> {
    let flat = |prefix: &str, rest: &str| format!("{prefix}_{}", rest.replace('.', "_"));
    if let Some(rest) = name.strip_prefix("unet.") {
        return Ok(flat("lora_unet", rest));
    }
    if let Some(rest) = name.strip_prefix("text_encoder.") {
        return Ok(flat("lora_te_text_model", rest));
    }
    Err(LearningError::Config(format!(
        "{name} is neither of the UNet nor of the text encoder"
    )))
}

/// A half of a pair as an f32 matrix: files keep convolutions of one pixel with two dimensions of 1 at the end.
fn matrix(tensor: &Tensor) -> Result<Option<Tensor>, LearningError> {
    let size = tensor.size();
    let dims = match size[..] {
        [rows, columns] | [rows, columns, 1, 1] => [rows, columns],
        _ => return Ok(None),
    };
    Ok(Some(tensor.f_reshape(dims)?.f_to_kind(Kind::Float)?))
}
