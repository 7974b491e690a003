"""The libtorch script, over a pip of our own: complete or nothing, once, and never against a set LIBTORCH."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path

import context

SCRIPT = context.DEMO.parent / "libtorch" / "fetch.sh"
MEMBERS = {
    "torch": {"torch/include/a.h": b"h", "torch/lib/libtorch_cpu.so": b"cpu", "torch/lib/libc10.so": b"c10",
              "torch/lib/libgomp.so.1": b"gomp", "torch/lib/libtorch_cuda.so": b"huge"},
    "nvidia-cuda-runtime": {"nvidia/cu13/lib/libcudart.so.13": b"cudart"},
    "nvidia-cuda-cupti": {"nvidia/cu13/lib/libcupti.so.13": b"cupti"},
}
# Stands before the real python3 in the PATH and answers `-m pip` alone.
PIP = """#!/bin/sh
if [ "$1 $2" != "-m pip" ]; then exec {python} "$@"; fi
if [ "$3" = --version ]; then exit 0; fi
for word; do last=$word; if [ "$previous" = --dest ]; then goal=$word; fi; previous=$word; done
name=${{last%%==*}}
echo "$name" >> {shelf}/asked
cp {shelf}/"$name".whl "$goal"/ 2>/dev/null || {{ echo "no matching distribution for $last" >&2; exit 1; }}
"""


def wheel(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


@unittest.skipUnless(sys.platform == "linux" and os.uname().machine == "x86_64", "the download is for x86_64 Linux")
class LibtorchTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.cache, self.shelf = self.folder / "cache", self.folder / "shelf"
        self.shelf.mkdir()
        # A copy of the script with the pins of our small wheels.
        text = SCRIPT.read_text()
        for name, members in MEMBERS.items():
            data = wheel(members)
            (self.shelf / f"{name}.whl").write_bytes(data)
            text, count = re.subn(rf'("{name}==[^|]+\|[^|]+\|)[0-9a-f]{{64}}', rf"\g<1>{hashlib.sha256(data).hexdigest()}", text)
            self.assertEqual(count, 1, name)
        self.script = self.folder / "script" / "fetch.sh"
        self.script.parent.mkdir()
        self.script.write_text(text)
        bin_folder = self.folder / "bin"
        bin_folder.mkdir()
        (bin_folder / "python3").write_text(PIP.format(python=sys.executable, shelf=self.shelf))
        (bin_folder / "python3").chmod(0o755)
        self.environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "CONCORD_CACHE": str(self.cache)}

    def fetch(self, **more):
        return subprocess.run(
            ["bash", str(self.script)], capture_output=True, text=True, env={**self.environment, **more}, timeout=60
        )

    def in_cache(self):
        return sorted(path.name for path in self.cache.iterdir() if path.name != "libtorch.lock")

    def test_the_folder_holds_what_a_cpu_build_needs_and_no_more(self):
        result = self.fetch()
        self.assertEqual(result.returncode, 0, result.stderr)
        target = self.cache / "libtorch-2.13.0"
        found = sorted(str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir())
        libraries = ["libc10.so", "libcudart.so.13", "libcupti.so.13", "libgomp.so", "libgomp.so.1", "libtorch.so", "libtorch_cpu.so"]
        self.assertEqual(found, ["build-version", "include/a.h", *(f"lib/{name}" for name in libraries)])
        self.assertEqual((target / "lib/libtorch.so").read_text(), "INPUT(libtorch_cpu.so)\n")
        self.assertEqual((target / "build-version").read_text(), "2.13.0\n")
        self.assertEqual((self.script.parent / "current").resolve(), target.resolve())
        self.assertEqual(self.in_cache(), ["libtorch-2.13.0"])

    def test_a_second_run_downloads_nothing(self):
        self.fetch()
        again = self.fetch()
        self.assertEqual(again.returncode, 0)
        self.assertIn("already there", again.stdout)
        self.assertEqual((self.shelf / "asked").read_text().split(), list(MEMBERS))

    def test_a_set_libtorch_wins(self):
        result = self.fetch(LIBTORCH="/opt/libtorch")
        self.assertEqual(result.returncode, 0)
        self.assertIn("LIBTORCH is set to /opt/libtorch", result.stdout)
        self.assertFalse(self.cache.exists())

    def test_an_altered_wheel_is_refused_and_leaves_nothing(self):
        with open(self.shelf / "nvidia-cuda-cupti.whl", "ab") as stream:
            stream.write(b"!")
        result = self.fetch()
        self.assertEqual(result.returncode, 1)
        self.assertIn("nvidia-cuda-cupti.whl is not the pinned file", result.stderr)
        self.assertEqual(self.in_cache(), [])
        self.assertFalse((self.script.parent / "current").exists())

    def test_a_failed_download_is_named_and_leaves_nothing(self):
        (self.shelf / "nvidia-cuda-runtime.whl").unlink()
        result = self.fetch()
        self.assertEqual(result.returncode, 1)
        self.assertIn("pip could not download nvidia-cuda-runtime==13.0.96", result.stderr)
        self.assertEqual(self.in_cache(), [])

    def test_the_leftovers_of_a_killed_run_are_cleared_away(self):
        leftover = self.cache / "libtorch-2.13.0.partial.dead"
        leftover.mkdir(parents=True)
        self.assertEqual(self.fetch().returncode, 0)
        self.assertEqual(self.in_cache(), ["libtorch-2.13.0"])

    def test_a_missing_pip_is_named(self):
        bare = self.folder / "bare"
        bare.mkdir()
        (bare / "python3").write_text("#!/bin/sh\nexit 1\n")
        (bare / "python3").chmod(0o755)
        for tool in ("bash", "uname", "mkdir", "dirname", "cat"):
            os.symlink(shutil.which(tool), bare / tool)
        result = self.fetch(PATH=str(bare))
        self.assertEqual(result.returncode, 1)
        self.assertIn("python3 has no pip", result.stderr)


if __name__ == "__main__":
    unittest.main()
