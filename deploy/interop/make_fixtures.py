#!/usr/bin/env python3
"""Small random checkpoints of every backbone family, and what `transformers` computes with them.

    make_fixtures.py            write common/learning/fixtures/<family>/ anew (only when the format changes)
    make_fixtures.py --missing  add the references of positions that have none yet, with the batch and parameters of the others
    make_fixtures.py --check    recompute every committed reference with the installed `transformers` and compare

Each family's folder is laid out in another of the ways that real checkpoints are (prefix or none, with or without a pretraining
head, f32 or f16 or bf16, plain or sentence-transformers), so that the loader is tried on all of them.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import reference
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FIXTURES = Path(__file__).resolve().parents[2] / "common" / "learning" / "fixtures"
HIDDEN, HEADS, INNER, POSITIONS = 24, 3, 40, 32
RANKS, CLASSES = (3, 2), 3
SCALE_GLOBAL, SCALE_PRIVATE = 0.75, 1.25
# Largest difference allowed between a committed result and a recomputed one.
SAME = {"f32": 2e-6, "f64": 1e-12}

CORPUS = [
    "the river rises after a night of rain",
    "a small boat waits at the old bridge",
    "she counts the apples and writes a letter",
    "rain falls on the roofs of the town",
    "the letter never reached the other town",
    "an old clock strikes twelve at night",
    "boats and bridges, apples and clocks!",
]
# Texts (or pairs) and the length that they are cut to. None: eight tokens beside the special ones, an even number, since releases of
# `tokenizers` differ in which of two long texts keeps the odd token.
CASES = [
    ("the river rises", None, 32),
    ("The boat, the bridge; and Ünknown wörds?", None, 32),
    ("she counts the apples and writes a letter to the town", None, 9),
    ("rain at night", "the river rises", 32),
    ("rain falls on the roofs of the old town at night", "a letter", 12),
    ("a boat", "the letter never reached the other town after the rain", 12),
    ("an old clock strikes twelve at night", "boats and bridges, apples and clocks", None),
    ("", None, 32),
]


def wordpiece(pad_to):
    """A BERT tokenizer; `pad_to` fixes padding and truncation in the file, as some published ones have it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    tokenizer.decoder = decoders.WordPiece()
    if pad_to:
        tokenizer.enable_padding(length=pad_to, pad_id=0, pad_token="[PAD]")
        tokenizer.enable_truncation(pad_to)
    return tokenizer


def byte_level():
    """A RoBERTa tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=285, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>")), add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def unigram():
    """An XLM-R tokenizer."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))],
    )
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def bert_sizes(vocab, layers, offset=0, **more):
    """The configuration fields that BERT and RoBERTa share."""
    return dict(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS + offset,
        **more,
    )


def families():
    """Per family: name, tokenizer, model, dtype of the file, subfolder, adapted layers."""
    tokenizer = wordpiece(pad_to=128)
    config = transformers.BertConfig(**bert_sizes(tokenizer.get_vocab_size(), 2))
    yield "bert", tokenizer, transformers.BertForPreTraining(config), torch.float32, "0_Transformer", [0, 1]

    roberta = dict(offset=2, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, layer_norm_eps=1e-5)
    tokenizer = byte_level()
    config = transformers.RobertaConfig(**bert_sizes(tokenizer.get_vocab_size(), 2, **roberta))
    yield "roberta", tokenizer, transformers.RobertaModel(config), torch.float16, "", [0, 1]

    tokenizer = unigram()
    config = transformers.XLMRobertaConfig(**bert_sizes(tokenizer.get_vocab_size(), 2, **roberta))
    yield "xlm-roberta", tokenizer, transformers.XLMRobertaForMaskedLM(config), torch.bfloat16, "", [1]

    tokenizer = wordpiece(pad_to=None)
    config = transformers.DistilBertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        dim=HIDDEN,
        n_layers=2,
        n_heads=HEADS,
        hidden_dim=INNER,
        max_position_embeddings=POSITIONS,
    )
    yield "distilbert", tokenizer, transformers.DistilBertForMaskedLM(config), torch.float16, "", [0, 1]


def randomise(model, generator):
    """Weights large enough that attention, positions and types all matter, and no bias or LayerNorm is trivial."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * values)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * values)
            else:
                parameter.copy_(0.3 * values)


def cases_for(tokenizer):
    """The cases with their lengths filled in."""
    even = 8 + tokenizer.num_special_tokens_to_add(True)
    return [(first, second, max_length or even) for first, second, max_length in CASES]


def encode(tokenizer, first, second, max_length):
    """Ids and types as Concord's client makes them: cut to `max_length`, not padded."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    encoding = tokenizer.encode(first, second)
    return encoding.ids, encoding.type_ids


def make_batch(tokenizer, pad_id):
    """Three rows of unlike length: two texts and a pair."""
    rows = [encode(tokenizer, *case) for case in (CASES[0], CASES[3], ("a letter", None, 32))]
    rows = [(ids[:9], types[:9]) for ids, types in rows]
    longest = max(len(ids) for ids, _ in rows)

    def padded(values, filler):
        return torch.tensor([list(row) + [filler] * (longest - len(row)) for row in values])

    return {
        "input_ids": padded([ids for ids, _ in rows], pad_id),
        "token_types": padded([types for _, types in rows], 0),
        "mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": torch.tensor([2, 0, 1]),
    }


def transformer_folder(folder):
    """Where the encoder's files are."""
    nested = folder / "0_Transformer"
    return nested if nested.is_dir() else folder


def make(name, tokenizer, model, dtype, subfolder, layers, seed):
    """Writes one family's folder."""
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    home = folder / subfolder
    home.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as saved:
        model.to(dtype).save_pretrained(saved)
        weights = load_file(Path(saved) / "model.safetensors")
        config = json.loads((Path(saved) / "config.json").read_text())
    config.pop("transformers_version")
    if name == "bert":  # a buffer that older exports stored
        weights["bert.embeddings.position_ids"] = torch.arange(POSITIONS).unsqueeze(0)
    save_file(weights, home / "model.safetensors", {"format": "pt"})
    reference.compact_json(home / "config.json", config)
    if subfolder:
        kind = "sentence_transformers.models."
        modules = [
            {"idx": 0, "name": "0", "path": subfolder, "type": kind + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": kind + "Pooling"},
        ]
        reference.compact_json(folder / "modules.json", modules)
    reference.compact_json(home / "tokenizer.json", json.loads(tokenizer.to_str()))
    cases = [
        dict(zip(("first", "second", "max_length", "ids", "type_ids"), (*case, *encode(tokenizer, *case))))
        for case in cases_for(tokenizer)
    ]
    reference.compact_json(folder / "tokens.json", cases)

    backbone = reference.load_backbone(home, torch.float32)
    parameters = reference.random_parameters(generator, backbone, layers, RANKS, CLASSES, up_std=0.3)
    batch = make_batch(tokenizer, backbone.config.pad_token_id)
    write_references(folder, batch, parameters, SCALE_GLOBAL, SCALE_PRIVATE)


def reference_file(folder, position):
    """The reference of a position; all of a family share batch and parameters."""
    return folder / ("reference.safetensors" if position == "ffn" else f"reference-{position}.safetensors")


def write_references(folder, batch, parameters, *scales):
    """Writes the references that are not there."""
    for position in reference.POSITIONS:
        path = reference_file(folder, position)
        if not path.exists():
            results = reference.compute(transformer_folder(folder), batch, parameters, *scales, position)
            reference.write(path, batch, parameters, results, *scales, position)
            print(f"wrote {path}")


def committed():
    """The folders of the families."""
    folders = sorted(path.parent for path in FIXTURES.glob("*/reference.safetensors"))
    if not folders:
        raise SystemExit(f"no fixtures in {FIXTURES}")
    return folders


def add_missing():
    """Adds the references of new positions to the committed folders."""
    for folder in committed():
        batch, parameters, _, *scales, _ = reference.read(reference_file(folder, "ffn"))
        write_references(folder, batch, parameters, *scales)


def check():
    """Recomputes every committed reference; a difference is an error."""
    failed = False
    for folder in committed():
        for position in reference.POSITIONS:
            batch, parameters, expected, *rest = reference.read(reference_file(folder, position))
            found = reference.compute(transformer_folder(folder), batch, parameters, *rest)
            worst = reference.largest_difference(found, expected, batch["mask"])
            good = rest[-1] == position and all(worst[kind] <= SAME[kind] for kind in SAME)
            failed |= not good
            verdict = "same" if good else "DIFFERENT"
            print(f"fixture {folder.name}, {position}: f32 {worst['f32']:.1e}, f64 {worst['f64']:.1e}: {verdict}")
        tokenizer = Tokenizer.from_file(str(transformer_folder(folder) / "tokenizer.json"))
        for case in json.loads((folder / "tokens.json").read_text()):
            ids, types = encode(tokenizer, case["first"], case["second"], case["max_length"])
            if (ids, types) != (case["ids"], case["type_ids"]):
                failed = True
                print(f"fixture {folder.name}: other tokens for {case['first']!r}, {case['second']!r}")
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--missing", action="store_true", help="add references, leave the rest as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if arguments.check:
        sys.exit(check())
    if arguments.missing:
        add_missing()
        return
    for seed, family in enumerate(families(), start=1):
        make(*family, seed=seed)
        print(f"wrote {FIXTURES / family[0]}")


if __name__ == "__main__":
    main()
