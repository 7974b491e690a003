//! Agreement with Python's `diffusers`.

use tch::Kind;

use super::*;
use crate::diffusion::testing::{self, CHECKPOINTS, FORWARD, GRADIENT, PLAIN, Spelling};

fn load(name: &str, kind: Kind) -> Vae {
    let folder = testing::checkpoint(name, PLAIN);
    Vae::load(&folder.path().join("vae"), testing::compute(kind)).unwrap()
}

fn image(kind: Kind) -> Tensor {
    testing::values("input.image", &[1, 3, 32, 40], 1.0, kind)
}

fn latent(kind: Kind) -> Tensor {
    testing::values("input.latent", &[2, 4, 8, 10], 2.0, kind)
}

#[test]
fn encoder_and_decoder_agree_with_diffusers() {
    for name in CHECKPOINTS {
        let reference = testing::results(name, "reference.safetensors");
        for (kind, bound) in FORWARD {
            let vae = load(name, kind);
            for (label, ours) in [
                ("moments", vae.encode_raw(&image(kind)).unwrap()),
                ("decoded", vae.decode(&latent(kind)).unwrap()),
            ] {
                let theirs = reference
                    .tensor(&format!("{}.vae.{label}", testing::prefix(kind)))
                    .unwrap();
                let apart = testing::apart(&ours, &theirs);
                println!("vae {name} {kind:?}: {label} {apart:.1e}");
                assert!(apart < bound, "{name} {kind:?} {label}: {apart}");
            }
        }
    }
}

#[test]
fn every_gradient_agrees_with_diffusers() {
    for name in CHECKPOINTS {
        for (kind, bound) in GRADIENT {
            let vae = load(name, kind);
            testing::track(vae.tensors());
            for (label, output) in [
                ("vae.encode", vae.encode_raw(&image(kind)).unwrap()),
                ("vae.decode", vae.decode(&latent(kind)).unwrap()),
            ] {
                let apart = testing::gradients_apart(name, label, &output, vae.tensors());
                println!("{label} {name} {kind:?}: gradients {apart:.1e}");
                assert!(apart < bound, "{name} {kind:?} {label}: {apart}");
            }
        }
    }
}

#[test]
fn the_older_spelling_of_attention_is_read() {
    let older = Spelling {
        name: |_, name| {
            if !name.contains(".attentions.") {
                return name.to_owned();
            }
            name.replace("to_q", "query")
                .replace("to_k", "key")
                .replace("to_v", "value")
                .replace("to_out.0", "proj_attn")
        },
        ..PLAIN
    };
    let folder = testing::checkpoint("sd1", older);
    let vae = Vae::load(&folder.path().join("vae"), Compute::CPU).unwrap();
    let (old, new) = (vae, load("sd1", Kind::Float));
    let decoded = |vae: &Vae| vae.decode(&latent(Kind::Float)).unwrap();
    assert!(testing::same(&decoded(&old), &decoded(&new)));
}

#[test]
fn the_variance_is_kept_in_bounds() {
    let vae = load("sd2", Kind::Float);
    let moments = vae
        .encode(&image(Kind::Float).f_mul_scalar(1e3).unwrap())
        .unwrap();
    assert_eq!(moments.mean.size(), moments.log_variance.size());
    assert!(moments.log_variance.max().double_value(&[]) <= LOG_VARIANCE.1);
}
