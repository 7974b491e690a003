"""Tests of which runs are used again, over a program of our own."""

import contextlib
import dataclasses
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent.parent / "demo"))

from arms import Setting  # noqa: E402
from runs import QUICK, Bench, Run  # noqa: E402

# Notes the jobs that it is asked for, and gives a result for each.
PROGRAM = f"""#!{sys.executable}
import json, sys
from pathlib import Path
words = sys.argv[1:]
jobs = [Path(job).stem for word, job in zip(words, words[1:]) if word == "--job"]
out = Path(words[words.index("--out") + 1])
with open(out.parent / "asked", "a") as asked:
    asked.writelines(job + "\\n" for job in jobs)
reports = [{{"job": job}} for job in jobs]
out.write_text(json.dumps(reports if len(reports) > 1 else reports[0]))
"""
FIRST, SECOND = (Run("fedprox", Setting({"name": "fedprox", "mu": mu}), 1) for mu in (0.01, 0.1))
OTHER_SEED = Run("fedavg", Setting({"name": "fedavg"}), 2)
ALL = [FIRST, SECOND, OTHER_SEED]


class Kept(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.program = self.folder / "program"
        self.program.write_text(PROGRAM)
        self.program.chmod(0o755)
        self.rows = [self.folder / f"tasks-{seed}" / "spam" / "train.csv" for seed in (1, 2)]
        for path in self.rows:
            path.parent.mkdir(parents=True)
            path.write_text("text,label\n")

    def asked(self, sizes=QUICK):
        """The runs that are not taken from earlier ones."""
        note = self.folder / "asked"
        note.write_text("")
        bench = Bench(self.program, Path("backbone"), self.folder, sizes)
        with contextlib.redirect_stdout(io.StringIO()):
            results = bench.run_all(ALL, "test")
        self.assertEqual({run.name(): result["job"] for run, result in results.items()}, {run.name(): run.name() for run in ALL})
        return sorted(note.read_text().split())

    def names(self, *runs):
        return sorted(run.name() for run in runs)

    def test_an_equal_run_is_used_again(self):
        self.assertEqual(self.asked(), self.names(*ALL))
        self.assertEqual(self.asked(), [])

    def test_another_program_runs_everything_again(self):
        self.asked()
        with self.program.open("a") as program:
            program.write("# built anew\n")
        self.assertEqual(self.asked(), self.names(*ALL))
        self.assertEqual(self.asked(), [])

    def test_other_rows_run_their_seed_again(self):
        self.asked()
        self.rows[1].write_text("text,label\nanother,one\n")
        self.assertEqual(self.asked(), self.names(OTHER_SEED))

    def test_other_sizes_run_everything_again(self):
        self.asked()
        self.assertEqual(self.asked(dataclasses.replace(QUICK, test=QUICK.test + 1)), self.names(*ALL))

    def test_a_result_is_used_only_with_its_own_specification_and_fingerprint(self):
        self.asked()
        (self.folder / f"{FIRST.name()}.toml").write_text("other = 1\n")
        (self.folder / f"{SECOND.name()}.fingerprint").unlink()
        (self.folder / f"{OTHER_SEED.name()}.json").unlink()
        self.assertEqual(self.asked(), self.names(*ALL))

    def test_the_fingerprint_says_what_a_result_was_made_with(self):
        self.asked()
        told = json.loads((self.folder / f"{FIRST.name()}.fingerprint").read_text())
        self.assertEqual(sorted(told), ["program", "rows", "sizes"])
        self.assertEqual((len(told["program"]), told["sizes"]["test"]), (64, QUICK.test))


if __name__ == "__main__":
    unittest.main()
