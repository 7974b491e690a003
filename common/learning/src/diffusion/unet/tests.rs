//! Agreement with Python's `diffusers`, and refusals.

use std::fs;

use safetensors::Dtype;

use super::*;
use crate::diffusion::testing::{self, CHECKPOINTS, FORWARD, GRADIENT, PLAIN, Spelling};

fn size(name: &str) -> (usize, usize) {
    if name == "sd1" { (32, 32) } else { (18, 12) }
}

fn load(name: &str, kind: Kind) -> UNet {
    let folder = testing::checkpoint(name, PLAIN);
    UNet::load(&folder.path().join("unet"), testing::compute(kind)).unwrap()
}

fn output(name: &str, unet: &UNet) -> Tensor {
    let kind = unet.compute().kind;
    let (height, width) = size(name);
    let sample = testing::values("input.sample", &[3, 4, height, width], 1.7, kind);
    let context = testing::values(
        "input.context",
        &[3, 11, unet.config().context as usize],
        1.7,
        kind,
    );
    let times = Tensor::from_slice(&[951_i64, 420, 1]);
    unet.run(&sample, &times, &context).unwrap()
}

#[test]
fn forward_agrees_with_diffusers() {
    for name in CHECKPOINTS {
        let reference = testing::results(name, "reference.safetensors");
        for (kind, bound) in FORWARD {
            let ours = output(name, &load(name, kind));
            let theirs = reference
                .tensor(&format!("{}.unet", testing::prefix(kind)))
                .unwrap();
            let apart = testing::apart(&ours, &theirs);
            println!("unet {name} {kind:?}: forward {apart:.1e}");
            assert!(apart < bound, "{name} {kind:?}: {apart}");
        }
    }
}

#[test]
fn every_gradient_agrees_with_diffusers() {
    for name in CHECKPOINTS {
        for (kind, bound) in GRADIENT {
            let unet = load(name, kind);
            testing::track(unet.tensors());
            let apart =
                testing::gradients_apart(name, "unet", &output(name, &unet), unet.tensors());
            println!("unet {name} {kind:?}: gradients {apart:.1e}");
            assert!(apart < bound, "{name} {kind:?}: {apart}");
        }
    }
}

/// A file in half precision means the same as an f32 file of its rounded values.
#[test]
fn half_precision_files_are_read() {
    for (dtype, rounded) in [
        (
            Dtype::F16,
            (|x| half::f16::from_f32(x).to_f32()) as fn(f32) -> f32,
        ),
        (Dtype::BF16, |x| half::bf16::from_f32(x).to_f32()),
    ] {
        let half = testing::checkpoint("sd2", Spelling { dtype, ..PLAIN });
        let half = UNet::load(&half.path().join("unet"), Compute::CPU).unwrap();
        let folder = testing::checkpoint("sd2", PLAIN);
        let mut tensors = testing::weights("sd2", "unet");
        for value in tensors.values_mut().flat_map(|tensor| &mut tensor.values) {
            *value = rounded(*value);
        }
        let file = testing::weights_file(folder.path(), "unet");
        testing::write(&file, &tensors, Dtype::F32);
        let full = UNet::load(&folder.path().join("unet"), Compute::CPU).unwrap();
        let apart = testing::apart(&output("sd2", &half), &output("sd2", &full));
        assert!(apart <= 0.0, "{dtype:?}");
    }
}

#[test]
fn missing_unexpected_and_misshapen_tensors_are_named() {
    let folder = testing::checkpoint("sd2", PLAIN);
    let mut tensors = testing::weights("sd2", "unet");
    let taken = tensors.remove("conv_in.bias").unwrap();
    tensors.insert("mid_block.stranger.weight".to_owned(), taken);
    tensors.get_mut("conv_out.bias").unwrap().shape = vec![2, 2];
    tensors.get_mut("conv_norm_out.bias").unwrap().values[0] = f32::NAN;
    testing::write(
        &testing::weights_file(folder.path(), "unet"),
        &tensors,
        Dtype::F32,
    );
    let complaint = UNet::load(&folder.path().join("unet"), Compute::CPU)
        .unwrap_err()
        .to_string();
    for part in [
        "1 missing tensors: conv_in.bias",
        "1 unexpected tensors: mid_block.stranger.weight",
        "conv_out.bias has shape [2, 2], not [4]",
        "conv_norm_out.bias holds values that are not finite",
    ] {
        assert!(complaint.contains(part), "{complaint}");
    }
}

#[test]
fn configurations_that_cannot_be_built_are_refused() {
    let text = fs::read_to_string(testing::fixture("sd2").join("unet/config.json")).unwrap();
    UNetConfig::parse(text.as_bytes()).unwrap();
    for (from, to, complaint) in [
        ("\"act_fn\":\"silu\"", "\"act_fn\":\"relu\"", "act_fn"),
        ("[16,24,40]", "[16,24,4000000000]", "block_out_channels"),
        ("[16,24,40]", "[16,24]", "levels"),
        ("[16,24,40]", "[15,24,40]", "odd"),
        ("[2,3,5]", "[2,3,0]", "attention_head_dim"),
        ("\"norm_eps\":1e-06", "\"norm_eps\":-1", "norm_eps"),
        ("UpBlock2D\"]", "KUpBlock2D\"]", "KUpBlock2D"),
        (
            "\"class_embed_type\":null",
            "\"class_embed_type\":\"timestep\"",
            "class_embed_type",
        ),
        (
            "\"layers_per_block\":1",
            "\"layers_per_block\":1000000",
            "layers_per_block",
        ),
    ] {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from}");
        let refusal = UNetConfig::parse(changed.as_bytes()).unwrap_err();
        assert!(refusal.contains(complaint), "{refusal}");
    }
    // Numbers that are fine by themselves and do not go together.
    for (from, to, complaint) in [
        ("[2,3,5]", "[2,3,7]", "counts heads"),
        (
            "\"norm_num_groups\":8",
            "\"norm_num_groups\":5",
            "norm_num_groups",
        ),
    ] {
        let config = UNetConfig::parse(text.replace(from, to).as_bytes()).unwrap();
        let params = Params::fresh(concord_common::seed::Seed(1), Compute::CPU);
        let refusal = UNet::build(config, params).unwrap_err().to_string();
        assert!(refusal.contains(complaint), "{refusal}");
    }
}

#[test]
fn a_fresh_network_follows_from_its_seed() {
    let config = UNetConfig::read(&testing::fixture("sd2").join("unet/config.json")).unwrap();
    let fresh = |seed| {
        let params = Params::fresh(concord_common::seed::Seed(seed), Compute::CPU);
        output("sd2", &UNet::build(config.clone(), params).unwrap())
    };
    let (first, again, other) = (fresh(1), fresh(1), fresh(2));
    assert!(testing::same(&first, &again));
    assert!(testing::apart(&first, &other) > 1e-3);
}
