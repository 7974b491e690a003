#!/usr/bin/env python3
"""What EfficientNet-Lite0 gives for a small image that follows from a seed, computed with PyTorch alone.

    efficientnet.py WEIGHTS.safetensors            write common/learning/fixtures/vision/efficientnet_lite0.json anew
    efficientnet.py WEIGHTS.safetensors --check    recompute it and compare

WEIGHTS is the file that deploy/artaug/fetch.py makes. The network is written down here a second time, without batch normalisation folded into the
convolutions, so that it can disagree with the one in Rust. Results with weights that follow from seeds stand beside those with the real ones: they can
be checked without the download.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

FIXTURE = Path(__file__).resolve().parents[2] / "common" / "learning" / "fixtures" / "vision" / "efficientnet_lite0.json"
# (repeats, kernel, stride of the first, expansion, channels in, channels out)
STAGES = [
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
]
SIDE, SEED, FIRST_WEIGHT_SEED, KEPT = 224, 11, 1000, 12
SAME = 1e-3


def same(x, weight, stride, groups=1):
    """A convolution with TensorFlow's "same" padding: the odd pixel goes to the right and the bottom."""
    kernel = weight.shape[-1]
    length = x.shape[-1]
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    x = F.pad(x, (total // 2, total - total // 2, total // 2, total - total // 2))
    return F.conv2d(x, weight, stride=stride, groups=groups)


def normalised(x, weights, name):
    """Batch normalisation with the statistics of the training."""
    parts = [weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *parts, eps=1e-3)


def forward(weights, images):
    """Features [n, 1280] and logits [n, 1000] of images [n, 3, 224, 224] in 0..255."""
    x = (images - 127.0) / 128.0
    x = F.relu6(normalised(same(x, weights["_conv_stem.weight"], 2), weights, "_bn0"))
    block = 0
    for repeats, _kernel, stride, expansion, _inner, _outer in STAGES:
        for repeat in range(repeats):
            name = f"_blocks.{block}"
            block += 1
            step = stride if repeat == 0 else 1
            y = x
            if expansion > 1:
                y = F.relu6(normalised(same(y, weights[f"{name}._expand_conv.weight"], 1), weights, f"{name}._bn0"))
            depthwise = weights[f"{name}._depthwise_conv.weight"]
            y = F.relu6(normalised(same(y, depthwise, step, groups=depthwise.shape[0]), weights, f"{name}._bn1"))
            y = normalised(same(y, weights[f"{name}._project_conv.weight"], 1), weights, f"{name}._bn2")
            x = x + y if y.shape == x.shape else y
    x = F.relu6(normalised(same(x, weights["_conv_head.weight"], 1), weights, "_bn1"))
    features = x.mean((2, 3))
    return features, F.linear(features, weights["_fc.weight"], weights["_fc.bias"])


def seeded_weights(shapes):
    """Weights that follow from seeds, in the order of the names: normal values by fan-in, norms near 1."""
    weights = {}
    for place, name in enumerate(sorted(shapes)):
        torch.manual_seed(FIRST_WEIGHT_SEED + place)
        values = torch.randn(shapes[name])
        if len(shapes[name]) > 1:
            fan_in = values[0].numel()
            weights[name] = values * (2.0 / fan_in) ** 0.5
        elif name.endswith("running_var") or (name.endswith(".weight") and "_fc" not in name):
            weights[name] = 1.0 + values.tanh() * 0.25
        else:
            weights[name] = values * 0.125
    return weights


def seeded_image():
    """32 x 32 pixels of noise, as bytes."""
    torch.manual_seed(SEED)
    return (torch.randn(1, 3, 32, 32) * 64.0 + 127.0).clamp(0.0, 255.0).to(torch.uint8)


def results(weights):
    """The first features and logits, the largest logit's place, and sums over all."""
    image = F.interpolate(seeded_image().float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    with torch.no_grad():
        features, logits = (row[0] for row in forward(weights, image))
    return {
        "features": [round(float(x), 6) for x in features[:KEPT]],
        "features_sum": round(float(features.double().sum()), 4),
        "logits": [round(float(x), 6) for x in logits[:KEPT]],
        "logits_sum": round(float(logits.double().sum()), 4),
        "largest": int(logits.argmax()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    real = load_file(arguments.weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in real.items()}
    found = {
        "made_by": "deploy/interop/efficientnet.py",
        "torch": torch.__version__.split("+")[0],
        "weights_sha256": hashlib.sha256(arguments.weights.read_bytes()).hexdigest(),
        "image_seed": SEED,
        "first_weight_seed": FIRST_WEIGHT_SEED,
        "shapes": {name: list(shape) for name, shape in sorted(shapes.items())},
        "seeded": results(seeded_weights(shapes)),
        "real": results(real),
    }
    if not arguments.check:
        FIXTURE.parent.mkdir(exist_ok=True)
        FIXTURE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    kept = json.loads(FIXTURE.read_text())
    for part in ("weights_sha256", "shapes"):
        if kept[part] != found[part]:
            sys.exit(f"efficientnet: {part} is not that of the fixture")
    for part in ("seeded", "real"):
        pairs = list(zip(kept[part]["features"] + kept[part]["logits"], found[part]["features"] + found[part]["logits"]))
        worst = max(abs(a - b) for a, b in pairs)
        if worst > SAME or kept[part]["largest"] != found[part]["largest"]:
            sys.exit(f"efficientnet: the {part} results are {worst} apart")
        print(f"efficientnet: {part} weights: as in the fixture, at most {worst:.1e} apart")
    return 0


if __name__ == "__main__":
    sys.exit(main())
