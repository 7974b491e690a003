"""The comparison of the ArtAug demo's arms over seeds: its arithmetic, its rule, and what it runs again."""

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

SCRIPT = Path(__file__).resolve().parent.parent / "seeds.py"
# By path, and with its own `demo`: deploy/demo has modules of the same names.
SPEC = importlib.util.spec_from_file_location("artaug_seeds", SCRIPT)
seeds = importlib.util.module_from_spec(SPEC)
sys.modules["artaug_seeds"] = seeds
SPEC.loader.exec_module(seeds)


def arm(gain, wins=6, ties=2, losses=2):
    return {"gain": {"mean": gain}, "wins": {"wins": wins, "ties": ties, "losses": losses}}


def last(enhanced, plain, rewriting=0.1, iteration=3):
    arms = {"base": arm(0.0), "enhanced": arm(enhanced), "plain-lora": arm(plain), "rewriting": arm(rewriting)}
    return {"iteration": iteration, "arms": arms}


class Arithmetic(unittest.TestCase):
    def test_a_win_rate_counts_half_of_the_ties(self):
        self.assertAlmostEqual(seeds.win_rate(arm(0.0)), 0.7)

    def test_the_interval_is_students(self):
        # Five values with mean 3 and standard deviation sqrt(2.5): 2.776 * sqrt(2.5 / 5).
        mean, low, high = seeds.mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
        self.assertAlmostEqual(mean, 3.0)
        self.assertAlmostEqual(high - mean, 1.9630, places=3)
        self.assertAlmostEqual(mean - low, high - mean)

    def test_one_seed_has_no_interval(self):
        with self.assertRaisesRegex(ValueError, "not 1"):
            seeds.mean_and_interval([1.0])


class Counted(unittest.TestCase):
    def test_an_iteration_that_stopped_before_its_training_does_not_count(self):
        stopped = {"iteration": 2, "arms": {"base": arm(0.0), "rewriting": arm(0.3)}}
        text = "\n".join(json.dumps(row) for row in (last(0.4, 0.2, iteration=1), stopped))
        self.assertEqual(seeds.counted(text), last(0.4, 0.2, iteration=1))

    def test_an_iteration_whose_control_the_time_ran_out_for_does_not_count(self):
        cut_short = last(0.5, 0.1, iteration=2)
        del cut_short["arms"]["plain-lora"]
        text = "\n".join(json.dumps(row) for row in (last(0.4, 0.2, iteration=1), cut_short))
        self.assertEqual(seeds.counted(text), last(0.4, 0.2, iteration=1))
        alone = seeds.counted(json.dumps(cut_short))
        self.assertEqual(alone["iteration"], 0)
        for name in ("enhanced", "plain-lora"):
            self.assertEqual(alone["arms"][name], cut_short["arms"]["base"])

    def test_a_seed_that_never_trained_counts_as_the_base(self):
        stopped = {"iteration": 1, "arms": {"base": arm(0.0, 0, 10, 0), "rewriting": arm(0.3)}}
        found = seeds.counted(json.dumps(stopped))
        self.assertEqual(found["iteration"], 0)
        for name, gain in (("enhanced", 0.0), ("plain-lora", 0.0), ("rewriting", 0.3)):
            self.assertEqual(found["arms"][name]["gain"]["mean"], gain)
        self.assertEqual(seeds.win_rate(found["arms"]["enhanced"]), 0.5)


class Rule(unittest.TestCase):
    def test_a_difference_is_shown_only_by_an_interval_without_zero(self):
        self.assertIn("better", seeds.verdict("it", 0.01, 0.2))
        self.assertIn("worse", seeds.verdict("it", -0.2, -0.01))
        self.assertIn("no difference", seeds.verdict("it", -0.1, 0.1))

    def test_the_table_has_every_seed_the_means_and_a_verdict_on_each_control(self):
        text = "\n".join(seeds.table({2: last(0.5, 0.3), 1: last(0.4, 0.25), 3: last(0.45, 0.2, iteration=1)}))
        self.assertIn("+0.450", text)
        self.assertIn("better than plain LoRA on X'", text)
        self.assertIn("better than prompt rewriting alone", text)
        self.assertLess(text.index("+0.400"), text.index("+0.500"))


class Running(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="seeds")
        self.addCleanup(folder.cleanup)
        self.out = Path(folder.name) / "out"
        self.programs = Path(folder.name)
        (self.programs / "concord-artaug").write_text("a program", encoding="utf-8")
        self.runs = []

    def demo(self, arguments):
        out, seed = Path(arguments[1]), int(arguments[-1])
        self.runs.append(seed)
        (out / "results").mkdir(parents=True, exist_ok=True)
        rows = (last(0.1, 0.9, iteration=1), last(0.4 + seed / 10, 0.2))
        (out / "results" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return 0

    def main(self, *arguments):
        shown = io.StringIO()
        with mock.patch.object(seeds.demo, "main", self.demo), contextlib.redirect_stdout(shown):
            self.assertEqual(seeds.main(["--out", str(self.out), "--programs", str(self.programs), *arguments]), 0)
        return shown.getvalue()

    def test_the_last_iteration_of_every_seed_counts(self):
        text = self.main("--seeds", "1,2")
        self.assertEqual(self.runs, [1, 2])
        self.assertIn("+0.500", text)
        self.assertNotIn("+0.900", text)

    def test_a_seed_that_has_run_is_not_run_again_unless_its_job_or_program_is_another(self):
        self.main("--seeds", "1,2")
        self.main("--seeds", "1,2,3")
        self.assertEqual(self.runs, [1, 2, 3])
        (self.out / "seed-2" / "run.txt").write_text("another", encoding="utf-8")
        self.main("--seeds", "1,2,3")
        self.assertEqual(self.runs, [1, 2, 3, 2])
        (self.programs / "concord-artaug").write_text("another program", encoding="utf-8")
        self.main("--seeds", "1,2")
        self.assertEqual(self.runs, [1, 2, 3, 2, 1, 2])

    def test_a_run_that_fails_ends_the_comparison_with_its_code(self):
        with mock.patch.object(seeds.demo, "main", return_value=130), contextlib.redirect_stdout(io.StringIO()):
            with self.assertRaises(SystemExit) as ended:
                seeds.main(["--out", str(self.out), "--programs", str(self.programs), "--seeds", "1,2"])
        self.assertEqual(ended.exception.code, 130)

    def test_programs_that_are_not_built_are_named(self):
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            self.assertEqual(seeds.main(["--out", str(self.out), "--programs", str(self.out)]), 1)
        self.assertIn("not built", shown.getvalue())

    def test_seeds_that_are_no_numbers_or_too_few_are_refused(self):
        for wrong in ("1,x", "1", "1,1", "-1,2"):
            with self.subTest(wrong), contextlib.redirect_stderr(io.StringIO()) as shown, self.assertRaises(SystemExit):
                seeds.main([f"--seeds={wrong}"])
            self.assertIn("--seeds", shown.getvalue())


if __name__ == "__main__":
    unittest.main()
