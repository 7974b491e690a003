#!/usr/bin/env python3
"""Writes the reference file of a real backbone: forward pass and adapter gradients as `transformers` computes them.

    minilm.py BACKBONE_FOLDER OUTPUT.safetensors [--position attention]

The batch holds texts and a pair of unlike length; adapters of bottleneck 16 stand in every layer.
"""

import argparse
from pathlib import Path

import reference
import torch
import transformers
from tokenizers import Tokenizer

ROWS = [
    ("That is a happy person", None),
    ("The committee postponed its decision, again, until every member had read the forty-page annex.", None),
    ("a body of water that flows to the sea", "they sailed down the river"),
    ("Dreadful.", None),
]
RANKS, CLASSES, SEED = (16, 16), 4, 5
SCALE_GLOBAL, SCALE_PRIVATE = 0.75, 1.25


def make_batch(folder, pad_id):
    """The rows as one padded batch."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=pad_id)
    encodings = tokenizer.encode_batch([first if second is None else (first, second) for first, second in ROWS])
    return {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "token_types": torch.tensor([encoding.type_ids for encoding in encodings]),
        "mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
        "labels": torch.arange(len(ROWS)) % CLASSES,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--position", choices=reference.POSITIONS, default="ffn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    model = reference.load_backbone(arguments.backbone, torch.float32)
    layers = range(len(reference.hooked_layers(model)))
    generator = torch.Generator().manual_seed(SEED)
    # Started at 1e-3, trained up-projections end near this size.
    parameters = reference.random_parameters(generator, model, layers, RANKS, CLASSES, up_std=0.03)
    batch = make_batch(arguments.backbone, model.config.pad_token_id)
    how = SCALE_GLOBAL, SCALE_PRIVATE, arguments.position
    results = reference.compute(arguments.backbone, batch, parameters, *how)
    reference.write(arguments.output, batch, parameters, results, *how)


if __name__ == "__main__":
    main()
