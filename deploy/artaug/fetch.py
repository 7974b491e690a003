#!/usr/bin/env python3
"""Fetches the icon sets from which ArtAug's embedded base model is trained into the cache folder, once.

They come inside npm packages; the package file and every file taken out of it are pinned by sha256, and a folder
appears whole or not at all, as with the demo's data (deploy/demo/fetch.py, whose downloading this uses).

    fetch.py [--cache DIR] [--only fluent,noto,twemoji]

Licences: Fluent Emoji MIT, Noto Emoji Apache-2.0, Twemoji CC BY 4.0; each folder holds the set's info.json, which
says so. Python 3.9 or later, standard library only; npm is called as a program.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
import fetch as demo  # noqa: E402


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


def main(arguments: Optional[list[str]] = None) -> int:
    """Command line; returns the exit code."""
    names = [resource.name for resource in RESOURCES]
    parser = argparse.ArgumentParser(description="Fetch the icon sets for ArtAug's embedded model into the cache folder.")
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
    try:
        for resource in RESOURCES:
            if resource.name in wanted:
                demo.fetch(resource, cache, say=lambda line: print(f"fetch: {line}", flush=True))
    except demo.FetchError as error:
        print(f"fetch: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch: stopped; nothing half-made was left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
