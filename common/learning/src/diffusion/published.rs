//! The configurations of Stable Diffusion 1.5 and 2.1 as they are published, with what the versions of `diffusers` since have added to them: every number
//! is read, and no field is refused.

use std::{fs, path::Path};

use tempfile::TempDir;

use super::{
    clip::{Activation, ClipConfig},
    prompt::PromptTokenizer,
    schedule::{Objective, Prediction},
    testing,
    unet::UNetConfig,
    vae::VaeConfig,
};

const UNET_15: &str = r#"{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#;

/// What a later version of `diffusers` writes beside these fields.
const UNET_LATER: &str = r#"{"addition_embed_type": null, "addition_embed_type_num_heads": 64, "class_embed_type": null,
    "class_embeddings_concat": false, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": null, "dropout": 0.0,
    "dual_cross_attention": false, "encoder_hid_dim": null, "mid_block_only_cross_attention": null,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "num_class_embeds": null, "only_cross_attention": false,
    "projection_class_embeddings_input_dim": null, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": false,
    "resnet_time_scale_shift": "default", "time_cond_proj_dim": null, "time_embedding_act_fn": null, "time_embedding_dim": null,
    "time_embedding_type": "positional", "timestep_post_act": null, "upcast_attention": null, "use_linear_projection": false}"#;

/// Those of 1.5 that 2.1 has otherwise.
const UNET_21: &str = r#"{"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": false,
    "num_class_embeds": null, "only_cross_attention": false, "sample_size": 96, "upcast_attention": true, "use_linear_projection": true}"#;

const VAE: &str = r#"{"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"], "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;

const VAE_LATER: &str = r#"{"force_upcast": true, "latents_mean": null, "latents_std": null, "mid_block_add_attention": true, "sample_size": 768,
    "scaling_factor": 0.18215, "shift_factor": null, "use_post_quant_conv": true, "use_quant_conv": true}"#;

const TEXT_15: &str = r#"{"_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
    "torch_dtype": "float32", "transformers_version": "4.22.0.dev0", "vocab_size": 49408}"#;

const TEXT_21: &str = r#"{"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512}"#;

const SCHEDULER_21: &str = r#"{"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": false, "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": false,
    "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null}"#;

/// `tokenizer_config.json`, whose tokens are objects, with 2.1's padding; 1.5 pads with the end.
const TOKENIZER: &str = r#"{"add_prefix_space": false, "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": false,
    "normalized": true, "rstrip": false, "single_word": false}, "do_lower_case": true, "eos_token": {"__type": "AddedToken",
    "content": "<|endoftext|>", "lstrip": false, "normalized": true, "rstrip": false, "single_word": false}, "errors": "replace",
    "model_max_length": 77, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", "unk_token": {"__type": "AddedToken",
    "content": "<|endoftext|>", "lstrip": false, "normalized": true, "rstrip": false, "single_word": false}}"#;

/// A file with the fields of all these texts; of one that comes twice the last counts.
fn file(folder: &TempDir, texts: &[&str]) -> std::path::PathBuf {
    let mut fields = serde_json::Map::new();
    for text in texts {
        fields.extend(serde_json::from_str::<serde_json::Map<_, _>>(text).unwrap());
    }
    let file = folder.path().join("config.json");
    fs::write(&file, serde_json::Value::Object(fields).to_string()).unwrap();
    file
}

#[test]
fn the_networks_of_stable_diffusion_1_5_and_2_1_are_read() {
    let folder = TempDir::new().unwrap();
    let read = |texts: &[&str]| UNetConfig::read(&file(&folder, texts)).unwrap();
    let first = read(&[UNET_15]);
    assert_eq!(read(&[UNET_15, UNET_LATER]), first);
    let second = read(&[UNET_15, UNET_LATER, UNET_21]);
    assert_eq!(read(&[UNET_15, UNET_21]), second);
    for (config, heads, context, side, linear) in [
        (&first, [8, 8, 8, 8], 768, 64, false),
        (&second, [5, 10, 20, 20], 1024, 96, true),
    ] {
        let of = |value: fn(&super::unet::Level) -> i64| -> Vec<i64> {
            config.levels.iter().map(value).collect()
        };
        assert_eq!(of(|level| level.channels), [320, 640, 1280, 1280]);
        assert_eq!(of(|level| level.heads), heads);
        assert_eq!(of(|level| level.resnets as i64), [2; 4]);
        assert_eq!(of(|level| level.depth as i64), [1; 4]);
        assert_eq!(of(|level| level.attends_down.into()), [1, 1, 1, 0]);
        assert_eq!(of(|level| level.attends_up.into()), [1, 1, 1, 0]);
        assert_eq!((config.in_channels, config.out_channels), (4, 4));
        assert_eq!((config.context, config.time), (context, 1280));
        assert_eq!(config.sample_size, Some((side, side)));
        assert_eq!(config.linear_projections, linear);
        assert_eq!(
            (config.groups, config.cosine_first, config.freq_shift),
            (32, true, 0)
        );
        assert!((config.eps - 1e-5).abs() < 1e-12);
    }
}

#[test]
fn the_autoencoder_of_stable_diffusion_is_read() {
    let folder = TempDir::new().unwrap();
    let read = |texts: &[&str]| VaeConfig::read(&file(&folder, texts)).unwrap();
    let config = read(&[VAE]);
    assert_eq!(read(&[VAE, VAE_LATER]), config);
    assert_eq!(config.channels, [128, 256, 512, 512]);
    assert_eq!((config.latent_channels, config.factor()), (4, 8));
    assert_eq!((config.resnets, config.groups), (2, 32));
    assert!((config.scaling_factor - 0.18215).abs() < 1e-12);
    assert!(config.quant_conv && config.post_quant_conv);
}

#[test]
fn the_text_encoders_of_stable_diffusion_1_5_and_2_1_are_read() {
    let folder = TempDir::new().unwrap();
    let read = |texts: &[&str]| ClipConfig::read(&file(&folder, texts)).unwrap();
    let (first, second) = (read(&[TEXT_15]), read(&[TEXT_15, TEXT_21]));
    assert_eq!((first.vocab, first.positions), (49_408, 77));
    assert_eq!((first.hidden, first.inner), (768, 3072));
    assert_eq!((first.layers, first.heads), (12, 12));
    assert_eq!(first.activation, Activation::QuickGelu);
    assert_eq!((second.hidden, second.inner), (1024, 4096));
    assert_eq!((second.layers, second.heads), (23, 16));
    assert_eq!(second.activation, Activation::Gelu);
}

#[test]
fn the_schedule_of_stable_diffusion_2_1_is_one_of_v_prediction() {
    let folder = TempDir::new().unwrap();
    let Objective::Noise(table) = Objective::read(&file(&folder, &[SCHEDULER_21])).unwrap() else {
        panic!("it is no flow");
    };
    assert_eq!(table.prediction(), Prediction::Velocity);
    assert_eq!(table.alphas().len(), 1000);
}

#[test]
fn the_tokenizers_of_stable_diffusion_1_5_and_2_1_are_read() {
    let source = testing::fixture("sd1").join("tokenizer");
    let ids = |settings: &str| {
        let folder = TempDir::new().unwrap();
        for name in ["vocab.json", "merges.txt"] {
            fs::copy(source.join(name), folder.path().join(name)).unwrap();
        }
        let write = |file: &Path| fs::write(file, settings).unwrap();
        write(&folder.path().join("tokenizer_config.json"));
        let tokenizer = PromptTokenizer::load(folder.path(), 77, 523).unwrap();
        tokenizer.ids("the fox").unwrap()
    };
    let first = ids(TOKENIZER);
    assert_eq!(first[..4], [521, 513, 517, 522]);
    assert!(first[4..].iter().all(|&id| id == 522));
    // "!" is the vocabulary's first token.
    let second =
        ids(&TOKENIZER.replace("\"pad_token\": \"<|endoftext|>\"", "\"pad_token\": \"!\""));
    assert_eq!(second[..4], first[..4]);
    assert!(second[4..].iter().all(|&id| id == 0));
}
