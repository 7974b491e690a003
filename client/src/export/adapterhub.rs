//! The folder layout of AdapterHub's library `adapters` (1.x).
//!
//! Concord's adapters stand where the library's Houlsby configuration has one of its two adapters, before the residual and its
//! LayerNorm: its output adapter after the feed-forward network's second dense layer, or its attention adapter (`mh_adapter`) after
//! the attention's output projection. With `original_ln_before = false`, `residual_before_ln = true` and `original_ln_after = true`
//! the library computes LayerNorm(h + A(h) + x), which is what the trainer computes. Global and private adapter together are
//! exactly one bottleneck of width r_g + r_p.

use std::fmt::Write as _;

use concord_common::job::{AdapterPosition, Pool};
use concord_learning::{
    LearningError,
    backbone::{BackboneConfig, Family},
    data::{InputKind, Problem},
    model::{ModelFacts, PersonalModel},
    named::{HostTensor, NamedTensors, to_safetensors},
};
use serde_json::{Map, Value, json};

use super::{ExportError, Part, card};
use crate::vault::Header;

/// Name of adapter and head in the folder.
const NAME: &str = "concord";
/// Version whose format this is.
const LIBRARY: &str = "adapters.1.3.0";

pub(super) fn parts(
    model: &PersonalModel,
    header: &Header,
    backbone: &BackboneConfig,
) -> Result<Vec<Part>, ExportError> {
    let (tensors, width) = adapter(model, backbone)?;
    let (weight, bias) = model.head()?;
    let mut parts = vec![
        Part {
            name: "adapter_config.json",
            bytes: pretty(&adapter_config(model, backbone, width)),
        },
        Part {
            name: "adapter.safetensors",
            bytes: to_safetensors(&tensors, "{}")?,
        },
    ];
    // The library's heads read the first token only, so that a head on the mean stands beside it.
    let head = match model.facts.pool {
        Pool::Cls => {
            parts.push(Part {
                name: "head_config.json",
                bytes: pretty(&head_config(model, backbone)),
            });
            ("model_head.safetensors", format!("heads.{NAME}.1."))
        }
        Pool::Mean => ("concord_head.safetensors", "head.".to_owned()),
    };
    let named = NamedTensors::from([
        (format!("{}weight", head.1), weight),
        (format!("{}bias", head.1), bias),
    ]);
    parts.push(Part {
        name: head.0,
        bytes: to_safetensors(&named, "{}")?,
    });
    parts.push(Part {
        name: "README.md",
        bytes: readme(model, header).into_bytes(),
    });
    Ok(parts)
}

/// The fused bottlenecks under the library's names, and their width.
fn adapter(
    model: &PersonalModel,
    backbone: &BackboneConfig,
) -> Result<(NamedTensors, usize), LearningError> {
    let mut tensors = NamedTensors::new();
    let mut width = 0;
    for &layer in &model.facts.adapter_layers {
        let fused = model.fused_bottleneck(layer)?;
        width = fused.down_bias.values.len();
        let place = place(backbone.family, model.facts.adapter_position, layer);
        let mut add = |name: &str, tensor: HostTensor| {
            tensors.insert(format!("{place}.adapters.{NAME}.{name}"), tensor);
        };
        add("adapter_down.0.weight", fused.down_weight);
        add("adapter_down.0.bias", fused.down_bias);
        add("adapter_up.weight", fused.up_weight);
        add("adapter_up.bias", fused.up_bias);
    }
    Ok((tensors, width))
}

/// The library's module that holds the adapters of a layer.
fn place(family: Family, position: AdapterPosition, layer: u32) -> String {
    let after_attention = position == AdapterPosition::Attention;
    let encoder = match family {
        Family::Bert => "bert.encoder",
        Family::Roberta | Family::XlmRoberta => "roberta.encoder",
        Family::DistilBert => "distilbert.transformer",
    };
    let module = match (family, after_attention) {
        (Family::DistilBert, false) => "output_adapters",
        (Family::DistilBert, true) => "attention_adapters",
        (_, false) => "output",
        (_, true) => "attention.output",
    };
    format!("{encoder}.layer.{layer}.{module}")
}

fn model_class(family: Family) -> &'static str {
    match family {
        Family::Bert => "BertAdapterModel",
        Family::Roberta => "RobertaAdapterModel",
        Family::XlmRoberta => "XLMRobertaAdapterModel",
        Family::DistilBert => "DistilBertAdapterModel",
    }
}

/// The library computes the width as floor(hidden / factor). Half a unit more in the divisor keeps rounding away from the edge
/// where the factor is no whole number.
pub(super) fn reduction_factor(hidden: usize, width: usize) -> f64 {
    if hidden.is_multiple_of(width) {
        (hidden / width) as f64
    } else {
        hidden as f64 / (width as f64 + 0.5)
    }
}

fn adapter_config(model: &PersonalModel, backbone: &BackboneConfig, width: usize) -> Value {
    let without: Vec<usize> = (0..backbone.layers)
        .filter(|layer| !model.facts.adapter_layers.contains(&(*layer as u32)))
        .collect();
    let mut whole = described(model, backbone);
    whole.insert(
        "config".to_owned(),
        json!({
            "mh_adapter": model.facts.adapter_position == AdapterPosition::Attention,
            "output_adapter": model.facts.adapter_position == AdapterPosition::Ffn,
            "reduction_factor": reduction_factor(backbone.hidden, width),
            "non_linearity": "gelu",
            "original_ln_before": false,
            "original_ln_after": true,
            "residual_before_ln": true,
            "adapter_residual_before_ln": false,
            "ln_before": false,
            "ln_after": false,
            "scaling": 1.0,
            "use_gating": false,
            "is_parallel": false,
            "cross_adapter": false,
            "inv_adapter": null,
            "inv_adapter_reduction_factor": null,
            "init_weights": "bert",
            "init_weights_seed": null,
            "dropout": 0.0,
            "stochastic_depth": 0.0,
            "leave_out": without,
            "phm_layer": false,
        }),
    );
    Value::Object(whole)
}

fn head_config(model: &PersonalModel, backbone: &BackboneConfig) -> Value {
    let labels: Option<Map<String, Value>> = match &model.facts.problem {
        Problem::Classification { classes } => Some(
            classes
                .iter()
                .enumerate()
                .map(|(index, class)| (class.clone(), json!(index)))
                .collect(),
        ),
        Problem::Regression => None,
    };
    let mut whole = described(model, backbone);
    whole.insert(
        "config".to_owned(),
        json!({
            "head_type": "classification",
            "num_labels": model.facts.problem.outputs(),
            "layers": 1,
            "activation_function": null,
            "label2id": labels,
            "use_pooler": false,
            "bias": true,
            "dropout_prob": null,
        }),
    );
    Value::Object(whole)
}

fn described(model: &PersonalModel, backbone: &BackboneConfig) -> Map<String, Value> {
    Map::from_iter([
        ("hidden_size".to_owned(), json!(backbone.hidden)),
        (
            "model_class".to_owned(),
            json!(model_class(backbone.family)),
        ),
        ("model_name".to_owned(), json!(model.facts.backbone_name)),
        ("model_type".to_owned(), json!(backbone.family.model_type())),
        ("name".to_owned(), json!(NAME)),
        ("version".to_owned(), json!(LIBRARY)),
    ])
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn readme(model: &PersonalModel, header: &Header) -> String {
    let mut text = card::opening(
        &["adapters"],
        "A personal adapter trained with Concord, for AdapterHub's `adapters`",
    );
    text += &card::facts(model, header);
    // `deploy/interop/adapterhub.py` fills folders and texts in, and runs it.
    text += "\n## Use\n\nThe global and the private adapter are joined into one bottleneck, which has their scales in it.\n\n```python\n\
             import safetensors.torch\n\
             from adapters import AutoAdapterModel\n\
             from transformers import AutoTokenizer\n\n\
             model = AutoAdapterModel.from_pretrained(\"the-backbone\").eval()\n\
             tokenizer = AutoTokenizer.from_pretrained(\"the-backbone\")\n";
    text += &code(&model.facts);
    text += "```\n";
    text
}

/// From the exported folder to logits, and to a number where the model gives numbers.
fn code(facts: &ModelFacts) -> String {
    let texts = match facts.input {
        InputKind::Single => "[\"a text\"]",
        InputKind::Pair => "[\"a text\"], [\"its second text\"]",
    };
    let inputs = format!(
        "inputs = tokenizer({texts}, truncation=True, padding=True, max_length={}, return_tensors=\"pt\")\n",
        facts.max_length
    );
    let mut text = match facts.pool {
        Pool::Cls => format!(
            "model.load_adapter(\"this-folder\", use_safetensors=True, set_active=True)\n\
             model.active_head = \"{NAME}\"\n\
             {inputs}\
             logits = model(**inputs).logits\n"
        ),
        Pool::Mean => format!(
            "model.load_adapter(\"this-folder\", use_safetensors=True, set_active=True, with_head=False)\n\
             model.active_head = None\n\
             head = safetensors.torch.load_file(\"this-folder/concord_head.safetensors\")\n\
             {inputs}\
             hidden = model(**inputs).last_hidden_state\n\
             mask = inputs[\"attention_mask\"].unsqueeze(-1)\n\
             pooled = (hidden * mask).sum(1) / mask.sum(1)\n\
             logits = pooled @ head[\"head.weight\"].T + head[\"head.bias\"]\n"
        ),
    };
    if facts.problem == Problem::Regression {
        let (std, mean) = (facts.target_std, facts.target_mean);
        let _ = writeln!(text, "number = logits * {std} + {mean}");
    }
    text
}
