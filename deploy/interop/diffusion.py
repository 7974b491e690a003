#!/usr/bin/env python3
"""LoRA files and fused models that Concord writes, loaded by `diffusers`; and how fast both are.

    diffusion.py <example diffusion>            compare
    diffusion.py <example diffusion> --bench    one pass of the UNet and 20 guided steps, at one and two threads

Uses the tiny checkpoints of diffusion_fixtures.py for the comparison, and for the benchmark one of the size of the embedded model.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusion_fixtures as fixtures
import diffusion_rule as rule
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

LATENTS, PIXELS = 5e-4, 0.001
PROMPT = "a red fox in the snow"


def save_model(folder, name, parts):
    """The whole folder, weights included."""
    for part in ("unet", "vae", "text_encoder"):
        rule.fill(parts[part], part)
    folder.mkdir()
    layout = folder.with_name(name)
    fixtures.write_layout(layout, parts)
    for part in ("unet", "vae", "text_encoder"):
        parts[part].to(torch.float32).save_pretrained(folder / part)
    for source in layout.rglob("*.*"):
        if source.name not in ("keys.json", "config.json"):
            target = folder / source.relative_to(layout)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())


# For a model whose index names a safety checker that is not there.
WITHOUT = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def pipeline(folder, **without):
    """The model as `diffusers` loads it."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, size, noise, output):
    """Ten guided steps."""
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return pipe(
        PROMPT,
        negative_prompt="",
        height=size[0] * factor,
        width=size[1] * factor,
        latents=noise.clone(),
        num_inference_steps=10,
        guidance_scale=7.5,
        output_type=output,
    ).images


def compare(program, name, parts):
    """Whether adapters in both layouts, whole and reduced, and the fused model give our image, for every placement."""
    good = True
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        folder = work / "model"
        save_model(folder, name, parts)
        noise = rule.values("input.noise", (1, 4, *parts["size"]), 1.7)
        plain = run(pipeline(folder, **WITHOUT), parts["size"], noise, "latent")
        for placement in ("attention", "transformers", "all"):
            home = work / placement
            home.mkdir()
            save_file({"noise": noise}, home / "noise.safetensors")
            subprocess.run([program, "adapter", placement, folder, home], check=True)
            ours = load_file(home / "ours.safetensors")
            if (plain - ours["latents"]).abs().max() < 100 * LATENTS:
                raise SystemExit(f"{name} {placement}: the adapter changes nothing, so the comparison shows nothing")
            for what in ("lora", "kohya", "reduced", "reduced-kohya", "fused"):
                if what == "fused":
                    pipe = pipeline(home / "fused")
                else:
                    pipe = pipeline(folder, **WITHOUT)
                    pipe.load_lora_weights(home, weight_name=f"{what}.safetensors")
                latents = (run(pipe, parts["size"], noise, "latent") - ours["latents"]).abs().max().item()
                pixels = torch.from_numpy(np.array(run(pipe, parts["size"], noise, "pil")[0])).double()
                off = ((pixels - ours["pixels"].double()).abs() > 1).double().mean().item()
                fine = latents <= LATENTS and off <= PIXELS
                good &= fine
                print(
                    f"{name} {placement:<12} {what:<13} latents {latents:.1e}, bytes off by more than 1: {off:.1e}: "
                    f"{'same' if fine else 'DIFFERENT'}"
                )
    return good


def measured(count, warm, call):
    """The middle of the times and the mean of the processor's, in milliseconds."""
    for _ in range(warm):
        call()
    times = []
    busy = time.process_time()
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[len(times) // 2], (time.process_time() - busy) * 1e3 / count


def bench(program):
    """Both programs in turn."""
    _, parts = next(iter(fixtures.checkpoints()))
    parts["unet"] = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        save_model(folder, "sd1", parts)
        pipe = pipeline(folder, **WITHOUT)
        unet = pipe.unet
        sample = torch.randn(2, 4, 32, 32)
        context = torch.randn(2, 77, 32)
        noise = torch.randn(1, 4, 32, 32)
        for threads in (1, 2):
            torch.set_num_threads(threads)

            def one_pass():
                unet.zero_grad()
                unet(sample, torch.tensor([900, 100]), encoder_hidden_states=context).sample.square().mean().backward()

            def steps():
                pipe(PROMPT, negative_prompt="", height=64, width=64, latents=noise.clone(), num_inference_steps=20,
                     guidance_scale=7.5, output_type="latent")

            theirs = {"pass": measured(7, 3, one_pass), "sample": measured(3, 1, steps)}
            text = subprocess.run([program, "bench", folder, str(threads)], check=True, capture_output=True, text=True)
            for line in text.stdout.splitlines():
                what, *ours = line.split()
                if what == "memory":
                    # Of this whole program, which has also made the model that both read.
                    mine, other = float(ours[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
                    print(f"{threads} threads, peak memory: concord {mine:.0f} MB, diffusers {other:.0f} MB with Python")
                    continue
                for clock, mine, other in zip(("clock", "processor"), map(float, ours), theirs[what]):
                    print(f"{threads} threads, {what}, {clock}: concord {mine:.0f} ms, diffusers {other:.0f} ms, "
                          f"{other / mine:.2f} times as fast")


def main():
    """Runs what was asked for."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    program = sys.argv[1]
    if "--bench" in sys.argv:
        bench(program)
        return
    good = all([compare(program, name, parts) for name, parts in fixtures.checkpoints()])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
