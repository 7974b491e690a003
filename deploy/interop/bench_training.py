#!/usr/bin/env python3
"""How fast a training step is in Python: the baseline of Concord's training benchmark.

    bench_training.py --backbone FOLDER --data train.csv [--layers 4,5] [--threads 1] ...

The model that a PyTorch user would write: the encoder of `transformers` with two bottleneck adapters hooked in, a head on the mean over the
tokens, AdamW and clipping by the norm; the loss is cross-entropy, and with --mu or --alpha the terms of FedMCP as docs/method.md gives them
(contrast of the adapters' token means under unbiased CKA, distance of the global adapter from the received one). Batches are consecutive
rows of the file, padded to the longest of each. CSV columns: text,label or text_a,text_b,label.

Prints one line of JSON; times are those of the fastest of the epochs, tokenizing and padding not included.
"""

import argparse
import csv
import json
import resource
import time
from pathlib import Path

import reference
import torch
import transformers
from tokenizers import Tokenizer
from torch.nn import functional


def read_rows(path, limit):
    """Texts (or pairs) and class numbers of the first `limit` rows."""
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))[:limit]
    pair = "text_a" in rows[0]
    texts = [(row["text_a"], row["text_b"]) if pair else row["text"] for row in rows]
    classes = {label: number for number, label in enumerate(sorted({row["label"] for row in rows}))}
    return texts, [classes[row["label"]] for row in rows], len(classes)


def make_batches(arguments, model, texts, labels):
    """Padded batches, in the order of the rows."""
    tokenizer = Tokenizer.from_file(str(arguments.backbone / "tokenizer.json"))
    tokenizer.enable_truncation(arguments.max_length, strategy="longest_first")
    tokenizer.enable_padding(pad_id=model.config.pad_token_id)
    batches = []
    for start in range(0, len(texts), arguments.batch_size):
        encodings = tokenizer.encode_batch(texts[start : start + arguments.batch_size])
        batches.append(
            {
                "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
                "token_types": torch.tensor([encoding.type_ids for encoding in encodings]),
                "mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
                "labels": torch.tensor(labels[start : start + arguments.batch_size]),
            }
        )
    return batches


def unbiased_hsic(k, l):
    """HSIC_1 of Song et al. (2012) of two Gram matrices, times n(n - 3)."""
    n = k.shape[0]
    k, l = k - torch.diag(torch.diag(k)), l - torch.diag(torch.diag(l))
    return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))


def cka(x, y):
    """Unbiased linear CKA of the rows of x and y; centred and scaled first, which changes nothing but the rounding."""
    x, y = (side - side.mean(0) for side in (x, y))
    x, y = (side / (side.detach().norm() + 1e-12) for side in (x, y))
    k, l = x @ x.T, y @ y.T
    scale = (unbiased_hsic(k, k) * unbiased_hsic(l, l)).clamp_min(0)
    return unbiased_hsic(k, l) / (scale + 1e-12).sqrt()


class Step:
    """One training step."""

    def __init__(self, arguments, model, parameters):
        self.arguments, self.model, self.parameters = arguments, model, parameters
        self.received = {name: value.detach().clone() for name, value in parameters.items() if ".global." in name}
        self.optimiser = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.01)
        self.means, self.mask = [], None
        for layer in arguments.layers:
            reference.hooked_layers(model)[layer].register_forward_hook(self.hook_of(layer))

    def hook_of(self, layer):
        def hook(_module, _inputs, h):
            shared = reference.bottleneck(self.parameters, f"adapter.{layer}.global", h)
            private = reference.bottleneck(self.parameters, f"adapter.{layer}.private", h)
            if self.arguments.mu > 0:
                with torch.no_grad():
                    received = reference.bottleneck(self.received, f"adapter.{layer}.global", h)
                self.means.append([reference.mean_pool(z, self.mask) for z in (shared, received, private)])
            return h + shared + private

        return hook

    def __call__(self, batch):
        self.means, self.mask = [], batch["mask"]
        hidden = reference.forward(self.model, batch)
        pooled = reference.mean_pool(hidden, self.mask)
        logits = functional.linear(pooled, self.parameters["head.weight"], self.parameters["head.bias"])
        loss = functional.cross_entropy(logits, batch["labels"])
        if self.arguments.alpha > 0:
            distance = sum(((self.parameters[name] - value) ** 2).sum() for name, value in self.received.items())
            loss = loss + self.arguments.alpha * 0.5 * distance
        if self.arguments.mu > 0 and len(batch["labels"]) >= 4:
            terms = [functional.softplus((cka(g, p) - cka(g, t)) / 0.5) for g, t, p in self.means]
            loss = loss + self.arguments.mu * torch.stack(terms).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        return loss.item()


def arguments_of():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--bottleneck", type=int, default=16)
    parser.add_argument("--layers", default="all", help="layers with adapters, counted from 0: 4,5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--mu", type=float, default=0.0)
    parser.add_argument("--alpha", type=float, default=0.0)
    return parser.parse_args()


def main():
    arguments = arguments_of()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)

    model = reference.load_backbone(arguments.backbone, torch.float32)
    depth = len(reference.hooked_layers(model))
    arguments.layers = range(depth) if arguments.layers == "all" else [int(part) for part in arguments.layers.split(",")]
    texts, labels, classes = read_rows(arguments.data, arguments.rows)
    batches = make_batches(arguments, model, texts, labels)
    ranks = (arguments.bottleneck, arguments.bottleneck)
    drawn = reference.random_parameters(torch.Generator().manual_seed(1), model, arguments.layers, ranks, classes, up_std=1e-3)
    step = Step(arguments, model, {name: value.float().requires_grad_() for name, value in drawn.items()})

    step(batches[0])  # the first call sets up thread pools and buffers
    times, losses = [], []
    for _ in range(arguments.epochs):
        started = time.perf_counter()
        losses.append(sum(step(batch) for batch in batches) / len(batches))
        times.append(time.perf_counter() - started)
    seconds = min(times)
    print(
        json.dumps(
            {
                "rows": len(texts),
                "steps": len(batches),
                "layers": list(arguments.layers),
                "threads": arguments.threads,
                "padded_tokens": sum(batch["input_ids"].numel() for batch in batches),
                "seconds_per_epoch": round(seconds, 4),
                "milliseconds_per_step": round(1000 * seconds / len(batches), 3),
                "examples_per_second": round(len(texts) / seconds, 2),
                "first_and_last_loss": [round(losses[0], 4), round(losses[-1], 4)],
                "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
