//! The model card.

use std::fmt::Write as _;

use concord_common::job::{AdapterPosition, Combine, Pool};
use concord_learning::{
    data::Problem,
    model::{ModelFacts, PersonalModel},
};

use crate::vault::Header;

/// The card of a plain export.
pub(super) fn plain(model: &PersonalModel, header: &Header) -> String {
    let mut card = opening(&[], "A personal model trained with Concord");
    card += &facts(model, header);
    card += "\n## Files\n\n\
             `model.safetensors` holds `global.layer.<i>.{down,up}.{weight,bias}`, `private.layer.<i>.…` where the model has \
             them, `gate` for `combine = \"gate\"`, `head.weight` and `head.bias`; its metadata entry `concord` holds the facts as \
             JSON.\n\n";
    let _ = writeln!(
        card,
        "In each adapter layer, {} and before its residual and LayerNorm: \
         h' = h + c_g A_g(h) + c_p A_p(h), where {}. \
         A(h) = up · GELU(down · h + b_d) + b_u, with the exact GELU (erf).",
        place(model.facts.adapter_position),
        coefficients(&model.facts)
    );
    card
}

/// c_g and c_p, as the trainer has them.
fn coefficients(facts: &ModelFacts) -> &'static str {
    match (facts.global_bottleneck, facts.private_bottleneck) {
        (Some(_), Some(_)) => match facts.combine {
            Combine::Sum => "c_g = s_g and c_p = s_p",
            Combine::Mean => "c_g = s_g / 2 and c_p = s_p / 2",
            Combine::Gate => {
                "c_g = g s_g and c_p = (1 - g) s_p, with g = sigmoid(gate[k]) \
                 in the k-th adapter layer, counted from 0"
            }
        },
        // An adapter that is alone has the scale s_g, whichever it is.
        (_, None) => "c_g = s_g and there is no A_p",
        (None, Some(_)) => "c_p = s_g and there is no A_g",
    }
}

/// The front matter and the title.
pub(super) fn opening(tags: &[&str], title: &str) -> String {
    let mut text = "---\ntags:\n- concord\n".to_owned();
    for tag in tags {
        let _ = writeln!(text, "- {tag}");
    }
    let _ = write!(text, "---\n\n# {title}\n\n");
    text += "This folder holds a silo's private adapter and head. It was made for that silo's own use.\n";
    text
}

fn place(position: AdapterPosition) -> &'static str {
    match position {
        AdapterPosition::Ffn => "after the feed-forward network",
        AdapterPosition::Attention => "after the attention's output projection",
    }
}

/// What the model is, what it reached, and its labels.
pub(super) fn facts(model: &PersonalModel, header: &Header) -> String {
    let facts = &model.facts;
    let mut text = "\n## Facts\n\n| | |\n|---|---|\n".to_owned();
    for (name, value) in rows(facts, header) {
        let _ = writeln!(text, "| {name} | {} |", cell(&value));
    }
    text += "\n## Metrics\n\n| split | metric | value |\n|---|---|---|\n";
    for (split, metrics) in &header.metrics {
        for (name, value) in metrics {
            let _ = writeln!(text, "| {split} | {name} | {value:.4} |");
        }
    }
    text += "\n## Labels\n\n";
    match &facts.problem {
        Problem::Classification { classes } => {
            text += "| output | label |\n|---|---|\n";
            for (index, class) in classes.iter().enumerate() {
                let _ = writeln!(text, "| {index} | {} |", cell(class));
            }
        }
        Problem::Regression => {
            let _ = writeln!(
                text,
                "One output; the predicted number is output × {} + {}.",
                facts.target_std, facts.target_mean
            );
        }
    }
    text
}

fn rows(facts: &ModelFacts, header: &Header) -> Vec<(&'static str, String)> {
    let bottleneck =
        |size: Option<u64>| size.map_or_else(|| "none".to_owned(), |size| size.to_string());
    vec![
        ("job", format!("{} ({})", facts.job, header.binding.job)),
        ("task", facts.task.clone()),
        ("silo", facts.silo.clone()),
        ("algorithm", facts.algorithm.clone()),
        ("best round", facts.round.to_string()),
        ("backbone", facts.backbone_name.clone()),
        (
            "BLAKE3 of the backbone's weights",
            facts.backbone.to_string(),
        ),
        ("adapter layers", format!("{:?}", facts.adapter_layers)),
        ("adapter position", place(facts.adapter_position).to_owned()),
        ("global bottleneck", bottleneck(facts.global_bottleneck)),
        ("private bottleneck", bottleneck(facts.private_bottleneck)),
        ("combine", format!("{:?}", facts.combine).to_lowercase()),
        (
            "scale of the global adapter, s_g",
            facts.scale_global.to_string(),
        ),
        (
            "scale of the private adapter, s_p",
            facts.scale_private.to_string(),
        ),
        (
            "pooling",
            match facts.pool {
                Pool::Mean => "mean over the tokens that are not padding".to_owned(),
                Pool::Cls => "first token".to_owned(),
            },
        ),
        ("longest input in tokens", facts.max_length.to_string()),
    ]
}

/// Text that cannot break a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}
