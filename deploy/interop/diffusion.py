#!/usr/bin/env python3
"""LoRA files and fused models that Concord writes, loaded by `diffusers`; and how fast both are.

    diffusion.py <example diffusion> <example job_lora>
        compare: adapters by themselves, and what the engine of jobs leaves after two iterations
    diffusion.py <example diffusion> --bench    one pass of the UNet and 20 guided steps, at one and two threads: times, and peak memory of the programs
    diffusion.py --row <model> <threads> pass|sample
        one of those with `diffusers`: milliseconds by the clock and of the processor, and the peak memory in MB; `--bench` starts it

Uses the tiny checkpoints of diffusion_fixtures.py for the comparison, and for the benchmark one of the size of the embedded model.
"""

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


def pipelines(folder, home, adapters):
    """The model with each adapter of a folder in turn, then the fused model there; with their names."""
    for adapter in adapters:
        pipe = pipeline(folder, **WITHOUT)
        pipe.load_lora_weights(home, weight_name=f"{adapter}.safetensors")
        yield adapter, pipe
    yield "fused", pipeline(home / "fused")


def off_by_more_than_one(pipe, size, noise, pixels):
    """The part of our image's bytes that differ by more than 1 from what `diffusers` draws from the same noise."""
    theirs = torch.from_numpy(np.array(run(pipe, size, noise, "pil")[0])).double()
    return ((theirs - pixels.double()).abs() > 1).double().mean().item()


def compare_job(program, name, parts):
    """Whether a job's files, joined over two iterations, whole and reduced, in both layouts, and its fused model give the image of our engine."""
    good = True
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        folder = work / "model"
        save_model(folder, name, parts)
        factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
        height, width = (str(side * factor) for side in parts["size"])
        for mode in ("joint", "per-pair"):
            home = work / mode
            home.mkdir()
            subprocess.run([program, mode, folder, width, height, home], check=True)
            ours = load_file(home / "ours.safetensors")
            noise, pixels = ours["noise"], ours["pixels"]
            if off_by_more_than_one(pipeline(folder, **WITHOUT), parts["size"], noise, pixels) < 100 * PIXELS:
                raise SystemExit(f"{name} {mode}: what was learned changes nothing, so the comparison shows nothing")
            adapters = ("lora.diffusers", "lora.kohya", "reduced.lora.diffusers", "reduced.lora.kohya")
            for what, pipe in pipelines(folder, home, adapters):
                off = off_by_more_than_one(pipe, parts["size"], noise, pixels)
                good &= off <= PIXELS
                print(f"{name} job {mode:<8} {what:<22} bytes off by more than 1: {off:.1e}: {'same' if off <= PIXELS else 'DIFFERENT'}")
    return good


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
            for what, pipe in pipelines(folder, home, ("lora", "kohya", "reduced", "reduced-kohya")):
                latents = (run(pipe, parts["size"], noise, "latent") - ours["latents"]).abs().max().item()
                off = off_by_more_than_one(pipe, parts["size"], noise, ours["pixels"])
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


def peak():
    """The program's largest resident memory so far, in MB. `getrusage` may give that of the program which started it."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def row(folder, threads, what):
    """One measurement, in a program of its own so that its peak memory is its own too."""
    torch.set_num_threads(threads)
    pipe = pipeline(folder, **WITHOUT)
    noise = torch.randn(1, 4, 32, 32)
    sample = torch.randn(2, 4, 32, 32)
    context = torch.randn(2, 77, 32)

    def one_pass():
        pipe.unet.zero_grad()
        output = pipe.unet(sample, torch.tensor([900, 100]), encoder_hidden_states=context).sample
        output.square().mean().backward()

    def steps():
        pipe(PROMPT, negative_prompt="", height=64, width=64, latents=noise.clone(), num_inference_steps=20,
             guidance_scale=7.5, output_type="latent")

    times = measured(7, 3, one_pass) if what == "pass" else measured(3, 1, steps)
    print(*times, peak())


def numbers(command):
    """What stands in the last line that a program prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stderr}")
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


def bench(program):
    """Both programs in turn, started anew for every row."""
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
        for threads in (1, 2):
            for what in ("pass", "sample"):
                arguments = [str(folder), str(threads), what]
                ours = numbers([program, "bench", *arguments])
                theirs = numbers([sys.executable, __file__, "--row", *arguments])
                for clock, mine, other in zip(("clock", "processor"), ours, theirs):
                    print(f"{threads} threads, {what}, {clock}: concord {mine:.0f} ms, diffusers {other:.0f} ms, "
                          f"{other / mine:.2f} times as fast")
                print(f"{threads} threads, {what}, peak memory: concord {ours[2]:.0f} MB, diffusers {theirs[2]:.0f} MB with Python", flush=True)


def main():
    """Runs what was asked for."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if sys.argv[1] == "--row":
        folder, threads, what = sys.argv[2:]
        row(folder, int(threads), what)
        return
    program = sys.argv[1]
    if "--bench" in sys.argv:
        bench(program)
        return
    good = [compare(program, name, parts) for name, parts in fixtures.checkpoints()]
    good += [compare_job(sys.argv[2], name, parts) for name, parts in fixtures.checkpoints()]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
