#!/usr/bin/env python3
"""BRISQUE scores of three images that follow from a formula, computed with the PyPI package of that name.

    brisque_scores.py            write common/learning/fixtures/vision/brisque.json anew
    brisque_scores.py --check    recompute it and compare

Needs a Python of its own: pip install brisque==0.2.0 opencv-python-headless "numpy<2.3" (the package does not run with later ones).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from brisque import BRISQUE

FIXTURE = Path(__file__).resolve().parents[2] / "common" / "learning" / "fixtures" / "vision" / "brisque.json"
SIDES = [(32, 32), (45, 64), (128, 97)]
SAME = 1e-3


def image(width, height):
    """A pattern of whole numbers with texture at several scales; Rust's side is common/learning/src/brisque/tests.rs."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    blocks = ((x // 5 + y // 7) % 4) * 40
    grain = (x * x * 7 + y * y * 13 + x * y * 29) % 61
    channels = [(blocks + grain + shift * 11) % 256 for shift in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    judge = BRISQUE(url=False)
    found = [{"width": w, "height": h, "score": round(float(judge.score(image(w, h))), 5)} for w, h in SIDES]
    if not arguments.check:
        FIXTURE.write_text(json.dumps(found, indent=1) + "\n")
        return
    for kept, now in zip(json.loads(FIXTURE.read_text()), found, strict=True):
        if abs(kept["score"] - now["score"]) > SAME:
            sys.exit(f"brisque: {kept} is now {now}")
        print(f"brisque: {now['width']} x {now['height']}: {now['score']} as in the fixture")


if __name__ == "__main__":
    main()
