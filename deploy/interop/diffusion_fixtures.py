#!/usr/bin/env python3
"""Small text-to-image checkpoints in the diffusers folder layout, and what `diffusers` computes with them.

    diffusion_fixtures.py            write common/learning/fixtures/diffusion/<name>/ anew (only when the format changes)
    diffusion_fixtures.py --check    recompute every committed reference with the installed `diffusers` and compare

The weights follow from their names (see diffusion_rule.py) and are not stored; `keys.json` holds the names and shapes that the library gives them.
`sd1` is laid out as Stable Diffusion 1.x (convolutions as projections, noise prediction, quick_gelu, vocab.json and merges.txt), `sd2` as 2.x
(linear projections, v-prediction, gelu, tokenizer.json) with other widths and attention in other places.
"""

import argparse
import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path

import diffusers
import diffusion_rule as rule
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FIXTURES = Path(__file__).resolve().parents[2] / "common" / "learning" / "fixtures" / "diffusion"
# Elements kept of a gradient; the sum of squares speaks for the others.
KEPT = 96
# Largest difference allowed between a committed result and a recomputed one.
SAME = {"f32": 1e-5, "f64": 1e-10}
SAMPLED = 1e-3
TEXTS = [
    "a red fox in the snow",
    "",
    "The Quick brown FOX's 42 jumps, isn't it? we'll see!!",
    "caf\u00e9 na\u00efve \u6f22\u5b57   two  spaces\tand a tab",
    "many words " * 60,
]
MERGES = ["t h", "th e</w>", "i n</w>", "r e", "f o", "fo x</w>", "o n", "a n", "s n"]


def vocabulary():
    """256 byte symbols, the same at a word's end, the merges' results, and the two special tokens: 523 in all."""
    symbols = byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + [merge.replace(" ", "") for merge in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def byte_symbols():
    """GPT-2's printable stand-ins for the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def tokenizer_json(vocab):
    """The file that a conversion of CLIP's tokenizer writes."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(merge.split()) for merge in MERGES],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token="<|endoftext|>",
        )
    )
    pattern = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
    from tokenizers import Regex

    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", vocab["<|endoftext|>"]), ("<|startoftext|>", vocab["<|startoftext|>"]), False, False
    )
    return json.loads(tokenizer.to_str())


def clip(hidden_act, hidden, layers, heads, vocab, pad):
    """A CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=hidden,
            intermediate_size=37,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=77,
            hidden_act=hidden_act,
            layer_norm_eps=1e-5,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=vocab["<|endoftext|>"],
            pad_token_id=pad,
            projection_dim=hidden,
        )
    )


def ddim(prediction):
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction,
    )


def checkpoints():
    """Name to components."""
    vocab = vocabulary()
    yield "sd1", {
        "unet": UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=32,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=32,
            sample_size=64,
            scaling_factor=0.18215,
        ),
        "text_encoder": clip("quick_gelu", 32, 5, 4, vocab, vocab["<|endoftext|>"]),
        "scheduler": ddim("epsilon"),
        "size": (32, 32),
    }
    yield "sd2", {
        "unet": UNet2DConditionModel(
            sample_size=24,
            block_out_channels=(16, 24, 40),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=(2, 3, 5),
            transformer_layers_per_block=2,
            norm_num_groups=8,
            norm_eps=1e-6,
            use_linear_projection=True,
            flip_sin_to_cos=False,
            freq_shift=1,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=96,
            scaling_factor=0.3,
        ),
        "text_encoder": clip("gelu", 24, 3, 3, vocab, 0),
        "scheduler": ddim("v_prediction"),
        # Odd after one halving: the way up must meet the skip connections' sizes.
        "size": (18, 12),
    }


def compact(path, value):
    """JSON without spaces, so that the fixtures stay small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def write_layout(folder, parts):
    """Configurations, names and tokenizer; everything of the folder but the weights."""
    vocab = vocabulary()
    compact(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            # Published models name these; Concord neither reads nor writes them.
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": True,
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    with tempfile.TemporaryDirectory() as saved:
        for part in ("unet", "vae", "text_encoder", "scheduler"):
            parts[part].save_pretrained(Path(saved) / part)
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            config = json.loads((Path(saved) / part / file).read_text())
            compact(folder / part / file, config)
            if part != "scheduler":
                weights = next((Path(saved) / part).glob("*.safetensors"))
                keys = {name: list(tensor.shape) for name, tensor in load_file(weights).items()}
                compact(folder / part / "keys.json", keys)
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>" if folder.name == "sd1" else "!",
    }
    home = folder / "tokenizer"
    compact(home / "tokenizer_config.json", {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    if folder.name == "sd1":
        compact(home / "vocab.json", vocab)
        (home / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    else:
        compact(home / "tokenizer.json", tokenizer_json(vocab))


def load_tokenizer(folder):
    """transformers' own."""
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def kept(gradient):
    """Some elements of a gradient, evenly spread, and the sum of squares of all."""
    flat = gradient.detach().reshape(-1)
    stride = -(-flat.numel() // KEPT)
    return torch.cat([flat[::stride], flat.double().square().sum().to(flat.dtype).reshape(1)])


def with_gradients(results, prefix, model, output, label):
    """Mean squared distance of `output` to a target made by rule, and every parameter's gradient."""
    target = rule.values(f"target.{label}", tuple(output.shape), 1.0).to(output.dtype)
    loss = torch.nn.functional.mse_loss(output, target)
    model.zero_grad()
    loss.backward()
    results[f"{prefix}.{label}.loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"{prefix}.{label}.grad.{name}"] = kept(parameter.grad)


def compute(folder, parts):
    """All reference results."""
    results = {}
    height, width = parts["size"]
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor(
        [tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids for text in TEXTS]
    )
    results["ids"] = ids
    for kind, prefix in ((torch.float32, "f32"), (torch.float64, "f64")):
        unet, vae, text = (parts[part].to(kind).eval() for part in ("unet", "vae", "text_encoder"))
        sample = rule.values("input.sample", (3, 4, height, width), 1.7).to(kind)
        context = rule.values("input.context", (3, 11, unet.config.cross_attention_dim), 1.7).to(kind)
        times = torch.tensor([951, 420, 1])
        output = unet(sample, times, encoder_hidden_states=context).sample
        results[f"{prefix}.unet"] = output.detach()
        with_gradients(results, prefix, unet, output, "unet")

        image = rule.values("input.image", (1, 3, 32, 40), 1.0).to(kind)
        moments = vae.encode(image).latent_dist.parameters
        results[f"{prefix}.vae.moments"] = moments.detach()
        with_gradients(results, prefix, vae, moments, "vae.encode")
        latent = rule.values("input.latent", (2, 4, 8, 10), 2.0).to(kind)
        decoded = vae.decode(latent).sample
        results[f"{prefix}.vae.decoded"] = decoded.detach()
        with_gradients(results, prefix, vae, decoded, "vae.decode")

        hidden = text(ids).last_hidden_state
        results[f"{prefix}.text"] = hidden[:, :, ::3].detach()
        with_gradients(results, prefix, text, hidden, "text")
    return {name: tensor.contiguous() for name, tensor in results.items()}


def schedulers(config):
    """The samplers, as Stable Diffusion's configuration makes them."""
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    for spacing in ("leading", "trailing", "linspace"):
        more = {**config, "timestep_spacing": spacing}
        yield f"ddim.{spacing}", DDIMScheduler.from_config(more)
        yield f"dpm.{spacing}", DPMSolverMultistepScheduler.from_config(more)
        yield f"euler.{spacing}", EulerDiscreteScheduler.from_config(more)


def sample(folder, parts):
    """Whole runs of the pipeline: 20 steps of DDIM with guidance 7.5 in pixels, other samplers in latents."""
    results = {}
    height, width = parts["size"]
    for part in ("unet", "vae", "text_encoder"):
        parts[part].to(torch.float32).eval()
    scale = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    pipe = StableDiffusionPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=load_tokenizer(folder),
        unet=parts["unet"],
        scheduler=parts["scheduler"],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    noise = rule.values("input.noise", (1, 4, height, width), 1.7)
    results["sample.alphas"] = parts["scheduler"].alphas_cumprod

    def run(steps, output):
        return pipe(
            TEXTS[0],
            negative_prompt=TEXTS[1],
            height=height * scale,
            width=width * scale,
            latents=noise.clone(),
            num_inference_steps=steps,
            guidance_scale=7.5,
            output_type=output,
        ).images

    results["sample.ddim20"] = run(20, "latent")
    results["sample.pixels"] = torch.from_numpy(np.array(run(20, "pil")[0]))
    config = dict(parts["scheduler"].config)
    for name, scheduler in schedulers(config):
        pipe.scheduler = scheduler
        results[f"sample.{name}"] = run(8, "latent")
        results[f"sample.{name}.times"] = scheduler.timesteps.double()
    from diffusers import FlowMatchEulerDiscreteScheduler

    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(9)
    results["sample.flow.sigmas"] = flow.sigmas.double()

    # In f64 throughout: the table has the same values, and what is reckoned with it is not rounded to f32.
    for part in ("unet", "vae", "text_encoder"):
        parts[part].to(torch.float64)
    pipe.scheduler = DDIMScheduler.from_config(config)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler.final_alpha_cumprod = pipe.scheduler.final_alpha_cumprod.double()
    noise = noise.double()
    results["f64.ddim20"] = run(20, "latent")
    for part in ("unet", "vae", "text_encoder"):
        parts[part].to(torch.float32)
    return {name: tensor.contiguous() for name, tensor in results.items()}


def adapted(parts):
    """What a UNet with a LoRA of rank 2 and alpha 3 gives, and the adapter's gradients; and the UNet, to save the adapter."""
    from peft import LoraConfig

    results = {}
    height, width = parts["size"]
    for kind, prefix in ((torch.float32, "f32"), (torch.float64, "f64")):
        unet = copy.deepcopy(parts["unet"]).to(kind).eval()
        unet.requires_grad_(False)
        layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
        unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=layers, init_lora_weights=False))
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_" in name:
                    values = rule.values(f"lora.{name.replace('.default', '')}", tuple(parameter.shape), 0.2)
                    parameter.copy_(values)
        sample = rule.values("input.sample", (3, 4, height, width), 1.7).to(kind)
        context = rule.values("input.context", (3, 11, unet.config.cross_attention_dim), 1.7).to(kind)
        output = unet(sample, torch.tensor([951, 420, 1]), encoder_hidden_states=context).sample
        results[f"{prefix}.lora"] = output.detach()
        found = {}
        with_gradients(found, prefix, unet, output, "lora")
        results |= {name.replace(".default", ""): tensor for name, tensor in found.items()}
        if kind == torch.float32:
            plain = unet
    return {name: tensor.contiguous() for name, tensor in results.items()}, plain


def write_lora(folder, unet):
    """The adapter as diffusers writes it, and renamed to kohya's layout with its alpha."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet)
    # Lists in place of sets, as the metadata's writer wants it.
    config = unet.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    with tempfile.TemporaryDirectory() as saved:
        StableDiffusionPipeline.save_lora_weights(
            saved,
            unet_lora_layers=convert_state_dict_to_diffusers(state),
            unet_lora_adapter_metadata=config,
            weight_name="lora.safetensors",
        )
        shutil.copyfile(Path(saved) / "lora.safetensors", folder / "lora.safetensors")
    kohya = {}
    for name, tensor in state.items():
        layer, half = name.removesuffix(".weight").rsplit(".", 1)
        stem = "lora_unet_" + layer.replace(".", "_")
        kohya[f"{stem}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = tensor.half().contiguous()
        kohya[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file(kohya, folder / "kohya.safetensors", {"ss_network_module": "networks.lora"})


def build(folder, parts):
    """All results of one checkpoint."""
    for part in ("unet", "vae", "text_encoder"):
        rule.fill(parts[part], part)
    computed = compute(folder, parts)
    sampled = sample(folder, parts)
    return computed, sampled, adapted(parts)


def compare(name, found, expected):
    """Whether two sets of results agree."""
    good = found.keys() == expected.keys()
    worst = {"f32": 0.0, "f64": 0.0, "sample": 0.0}
    for key in found.keys() & expected.keys():
        difference = (found[key].double() - expected[key].double()).abs().max().item()
        kind = key.split(".")[0] if key.split(".")[0] in worst else "f64"
        if key == "sample.pixels":
            good &= difference <= 1
            continue
        worst[kind] = max(worst[kind], difference)
    good &= worst["f32"] <= SAME["f32"] and worst["f64"] <= SAME["f64"] and worst["sample"] <= SAMPLED
    shown = ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items())
    print(f"fixture diffusion/{name}: {shown}: {'same' if good else 'DIFFERENT'}")
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    checking = parser.parse_args().check
    good = True
    for name, parts in checkpoints():
        folder = FIXTURES / name
        if not checking:
            shutil.rmtree(folder, ignore_errors=True)
            write_layout(folder, parts)
        computed, sampled, (lora, unet) = build(folder, parts)
        if checking:
            good &= compare(name, computed, load_file(folder / "reference.safetensors"))
            good &= compare(name, sampled, load_file(folder / "samples.safetensors"))
            good &= compare(name, lora, load_file(folder / "lora_reference.safetensors"))
        else:
            save_file(computed, folder / "reference.safetensors")
            save_file(sampled, folder / "samples.safetensors")
            save_file(lora, folder / "lora_reference.safetensors")
            write_lora(folder, unet)
            print(f"wrote {folder}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
