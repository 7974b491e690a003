"""Tests of the results page on made-up results."""

import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent.parent / "demo"))

import page  # noqa: E402
from arms import ARMS, scoped  # noqa: E402
from runs import QUICK, Run, specification  # noqa: E402


def made_up(ours: float, task_a_local: float = 0.7) -> dict:
    rows = []
    for arm in ARMS:
        for seed in (1, 2):
            for task, base in (("a", task_a_local), ("b", 0.6)):
                value = base + (ours if arm.name == "fedmcp" else 0.0) + (0.01 if arm.name == "fedavg" else 0.0)
                scores = {"accuracy": value, "macro_f1": value, "mcc": value}
                rows.append(
                    {
                        "arm": arm.name,
                        "seed": seed,
                        "task": task,
                        "majority": 0.5,
                        "best": scores,
                        "last": scores,
                        "validation": [[1, value], [2, value]],
                        "similarities": [[1, 0.9, 0.1]] if arm.name == "fedmcp" else [],
                    }
                )
    chosen = {arm.name: {"setting": 0, "grid": []} for arm in ARMS}
    return {"sizes": vars(QUICK), "chosen": chosen, "rows": rows, "quick": False}


class Page(unittest.TestCase):
    def test_the_best_baseline_is_the_one_with_the_highest_test_score(self):
        self.assertEqual(page.Results(made_up(0.0)).best_baseline(), "fedavg")

    def test_a_large_effect_and_none_give_different_verdicts(self):
        self.assertIn("the claim holds here", page.verdict_lines(page.Results(made_up(0.05))))
        self.assertIn("worse than the best baseline", page.verdict_lines(page.Results(made_up(0.0))))

    def test_a_task_that_local_training_cannot_do_is_left_out(self):
        self.assertEqual(page.Results(made_up(0.0, task_a_local=0.51)).tasks, ["b"])

    def test_publishing_replaces_only_what_is_between_the_marks(self):
        with tempfile.TemporaryDirectory() as folder:
            docs = Path(folder)
            (docs / "experiments.md").write_text(f"before\n{page.BEGIN}\nstale\n{page.END}\nafter\n")
            page.publish(made_up(0.05), docs)
            text = (docs / "experiments.md").read_text()
            self.assertTrue(text.startswith("before\n") and text.endswith("\nafter\n"))
            self.assertNotIn("stale", text)
            self.assertTrue((docs / "experiments" / "differences.svg").exists())

    def test_layers_and_rounds_have_a_table_of_their_own_between_their_marks(self):
        scores = {"local": 0.78, "fedmcp-mu0": 0.785, "fedmcp": 0.77}
        with tempfile.TemporaryDirectory() as folder:
            docs = Path(folder)
            (docs / "experiments.md").write_text(f"before\n{page.SCOPES_BEGIN}\nstale\n{page.SCOPES_END}\nafter\n")
            page.publish_scopes(page.scope_table([{"layers": (4, 5), "rounds": 12, **scores}]), docs)
            text = (docs / "experiments.md").read_text()
        self.assertIn("| 4, 5 | 12 | 78.0 | 78.5 | 77.0 | -1.0 |", text)
        self.assertNotIn("stale", text)
        self.assertTrue(text.startswith("before\n") and text.endswith("\nafter\n"))

    def test_layers_and_rounds_of_a_scope_reach_the_job(self):
        for arm, setting in scoped((2, 3), 9).items():
            text = specification(Run(arm, setting, 1), QUICK)
            self.assertIn("layers = [2, 3]", text)
            self.assertIn("count = 9", text)


class Specification(unittest.TestCase):
    def test_every_setting_has_a_name_of_its_own_and_goes_into_the_job(self):
        runs = [Run(arm.name, setting, 1) for arm in ARMS for setting in arm.grid]
        self.assertEqual(len({run.name() for run in runs}), len(runs))
        for run in runs:
            self.assertIn(f'name = "{run.setting.algorithm["name"]}"', specification(run, QUICK))


if __name__ == "__main__":
    unittest.main()
