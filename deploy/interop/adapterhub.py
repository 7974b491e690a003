#!/usr/bin/env python3
"""An export for AdapterHub, loaded by the library `adapters`, against `concord-client predict --logits`.

    adapterhub.py <concord-client> <MiniLM folder>

Trains small federations with `concord-client simulate` on the tiny random checkpoints of every family and on MiniLM,
exports each personal model, runs the code that its README shows, and compares the logits of some texts, or the numbers.
"""

import csv
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

FIXTURES = Path(__file__).resolve().parents[2] / "common" / "learning" / "fixtures"
TOLERANCE = 1e-4
MAX_LENGTH = 20
WORDS = (
    "the river rises after a night of rain small boat waits at old bridge she counts apples and writes letter falls on "
    "roofs town clock strikes twelve boats bridges clocks never reached other"
).split()


@dataclass(frozen=True)
class Case:
    """One export."""

    name: str
    backbone: Path
    adapter: dict = field(default_factory=dict)
    pool: str = "mean"
    pair: bool = False
    regression: bool = False
    algorithm: str = "fedmcp"


def cases(minilm):
    """Every family in both positions, every way to join the adapters, both poolings, pairs, numbers, and adapters that stand alone."""
    moved = {"position": "attention"}
    gate = {"combine": "gate", "scale_global": 0.8, "scale_private": 1.3}
    yield Case("bert, sum", FIXTURES / "bert", {"bottleneck": 5, "private_bottleneck": 2})
    yield Case("bert, gate, cls", FIXTURES / "bert", {"bottleneck": 4, **gate}, pool="cls")
    yield Case("bert, one layer, pairs", FIXTURES / "bert", {"bottleneck": 7, "layers": [1]}, pair=True)
    yield Case("roberta, mean, cls", FIXTURES / "roberta", {"bottleneck": 3, "combine": "mean"}, pool="cls")
    yield Case("xlm-roberta, numbers", FIXTURES / "xlm-roberta", {"bottleneck": 6}, regression=True, pool="cls")
    yield Case("distilbert, ditto", FIXTURES / "distilbert", {"bottleneck": 5}, algorithm="ditto")
    yield Case("MiniLM, sum", minilm, {"bottleneck": 16, "layers": [4, 5]})
    yield Case("MiniLM, all layers, cls", minilm, {"bottleneck": 10}, pool="cls")
    yield Case("attention: bert, gate, cls", FIXTURES / "bert", {"bottleneck": 4, **gate, **moved}, pool="cls")
    yield Case("attention: roberta", FIXTURES / "roberta", {"bottleneck": 5, "private_bottleneck": 2, **moved})
    yield Case("attention: xlm-roberta, layer 1", FIXTURES / "xlm-roberta", {"bottleneck": 6, "layers": [1], **moved})
    yield Case("attention: distilbert, pairs", FIXTURES / "distilbert", {"bottleneck": 5, **moved}, pair=True)
    yield Case("attention: MiniLM, top layers", minilm, {"bottleneck": 16, "layers": [4, 5], **moved})


def toml(value):
    """A TOML value."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def text(rng, most=12):
    """A few words."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def write_task(folder, case, seed):
    """Rows whose label depends on a word, in three files."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    columns = ["text", "second", "label"] if case.pair else ["text", "label"]
    for split, rows in (("train", 48), ("validation", 16), ("test", 16)):
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            for _ in range(rows):
                first, second = text(rng), text(rng)
                score = sum(word in first.split() for word in WORDS[:10])
                label = score / 3 if case.regression else ("none", "some", "many")[min(score, 2)]
                writer.writerow([first, second, label] if case.pair else [first, label])


def task_lines(case, folder):
    """The lines of a task's table."""
    columns = {"text": "text", "label": "label", **({"text_b": "second"} if case.pair else {})}
    return [
        'name = "toy"',
        'format = "csv"',
        f"kind = {toml('pair' if case.pair else 'single')}",
        f"problem = {toml('regression' if case.regression else 'classification')}",
        f"columns = {toml(columns)}",
        *(f"{split} = {toml(str(folder / f'{split}.csv'))}" for split in ("train", "validation", "test")),
    ]


def transformer_folder(backbone):
    """Where config.json is."""
    return backbone / "0_Transformer" if (backbone / "0_Transformer").is_dir() else backbone


def sizes(backbone):
    """Width and layers from config.json."""
    config = json.loads((transformer_folder(backbone) / "config.json").read_text())
    return config.get("hidden_size", config.get("dim")), config.get("num_hidden_layers", config.get("n_layers"))


def train(program, case, work):
    """Runs a small job over two silos and returns a configuration that finds the first silo's model."""
    hidden, layers = sizes(case.backbone)
    silos = ["[[backbone]]", 'name = "base"', f"path = {toml(str(case.backbone))}"]
    for number, name in enumerate(("a", "b")):
        write_task(work / name, case, number)
        silos += ["[[silo]]", f'id = "{name}"', "[silo.task]", *task_lines(case, work / name)]
    (work / "silos.toml").write_text("\n".join(silos) + "\n")
    adapter = "\n".join(f"{key} = {toml(value)}" for key, value in case.adapter.items())
    (work / "job.toml").write_text(
        f"""
kind = "federated-training"
name = "interop"
task = "toy"
seed = 11
[backbone]
name = "base"
hidden = {hidden}
layers = {layers}
[adapter]
init_up = 0.05
{adapter}
[head]
pool = "{case.pool}"
[algorithm]
name = "{case.algorithm}"
[training]
batch_size = 8
epochs = 2
learning_rate = 0.01
head_learning_rate = 0.05
max_length = {MAX_LENGTH}
[rounds]
count = 2
"""
    )
    state = work / "state"
    run(program, "simulate", "--job", work / "job.toml", "--silos", work / "silos.toml", "--state", state)
    config = [
        "[server]",
        'address = "localhost:1"',
        "[tls]",
        'certificate = "unused"',
        'key = "unused"',
        'ca = "unused"',
        "[state]",
        f"folder = {toml(str(state / 'simulation-1' / 'a'))}",
        "[[backbone]]",
        'name = "base"',
        f"path = {toml(str(case.backbone))}",
        "[[task]]",
        *task_lines(case, work / "a"),
    ]
    (work / "client.toml").write_text("\n".join(config) + "\n")
    return work / "client.toml"


def run(*command, **more):
    """A program's output, or its complaint."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **more)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stderr}")
    return done.stdout


def code_of(case, export, inputs):
    """The code in the exported README with its placeholders filled in: all inputs in one padded batch."""
    code = (export / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    filled = {"the-backbone": str(transformer_folder(case.backbone)), "this-folder": str(export)}
    texts = ('["a text"]', '["its second text"]')
    filled.update((placeholder, str(list(column))) for placeholder, column in zip(texts, zip(*inputs)))
    for placeholder, value in filled.items():
        if placeholder not in code:
            raise SystemExit(f"{case.name}: {placeholder} is not in the README's code:\n{code}")
        code = code.replace(placeholder, value)
    return code


def adapterhub_outputs(case, code):
    """What that code computes, and how far a logit moves when its last lines run with the adapter switched off."""
    names = {}
    with torch.no_grad():
        exec(code, names)
        result, logits = names["number" if case.regression else "logits"], names["logits"]
        names["model"].set_active_adapters(None)
        exec(code[code.index("inputs = ") :], names)
    return result, (names["logits"] - logits).abs().max().item()


def compare(program, case):
    """Largest difference between the two programs' logits, or numbers."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        config = train(program, case, work)
        run(program, "export", "--config", config, "--format", "adapterhub", "--out", work / "export")
        rng = random.Random(99)
        # Where both texts of a pair are longer than the limit, releases of `tokenizers` differ in which one keeps the odd
        # token (0.22 here, 0.23 in Concord): that is not what is compared, so the second text is short.
        inputs = [(text(rng), text(rng, most=3)) if case.pair else (text(rng),) for _ in range(40)]
        lines = "\n".join(map("\t".join, inputs)) + "\n"
        predicted = map(json.loads, run(program, "predict", "--config", config, "--logits", input=lines).splitlines())
        ours = torch.tensor([[line["value"]] if case.regression else line["logits"] for line in predicted])
        theirs, moved = adapterhub_outputs(case, code_of(case, work / "export", inputs))
        if ours.shape != theirs.shape:
            raise SystemExit(f"{case.name}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
        if moved < 100 * TOLERANCE:
            raise SystemExit(f"{case.name}: the adapter changes nothing, so the comparison shows nothing")
        return (ours - theirs).abs().max().item()


def main():
    """Runs all cases."""
    program, minilm = sys.argv[1:]
    worst = 0.0
    for case in cases(Path(minilm)):
        difference = compare(program, case)
        print(f"{case.name:<32} largest difference {difference:.1e}", flush=True)
        worst = max(worst, difference)
    if worst > TOLERANCE:
        raise SystemExit(f"adapterhub: {worst:.1e} is above {TOLERANCE:.0e}")
    print(f"adapterhub: the code of the exports' pages gives the same logits and numbers to {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
