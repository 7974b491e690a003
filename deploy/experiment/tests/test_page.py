"""Tests of the results page on made-up results."""

import importlib.util
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent.parent / "demo"))

import page  # noqa: E402
from arms import ARMS, COMPARISONS, STRENGTHS, scoped, with_strength  # noqa: E402
from runs import QUICK, Run, specification  # noqa: E402

# By its path: the demo has a module of the same name.
_spec = importlib.util.spec_from_file_location("experiment_run", HERE.parent / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)


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

    def test_a_comparison_has_a_table_of_its_own_between_its_marks(self):
        scores = {"local": 0.78, "fedmcp-mu0": 0.785, "fedmcp": 0.77}
        compared = {
            "scopes": (scores, "| 4, 5 | 12 | 78.0 | 78.5 | 77.0 | -1.0 |"),
            "mu": ({arm: scores[arm] for arm in ("local", "fedmcp")}, "| 0.03 | 78.0 | 77.0 | -1.0 |"),
        }
        for comparison in COMPARISONS:
            with self.subTest(comparison.name), tempfile.TemporaryDirectory() as folder:
                scores, line = compared[comparison.name]
                docs = Path(folder)
                begin, end = f"<!-- {comparison.name}: begin -->", f"<!-- {comparison.name}: end -->"
                (docs / "experiments.md").write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
                table = page.comparison_table(comparison, [scores] * len(comparison.cases))
                page.publish_comparison(comparison, table, docs)
                text = (docs / "experiments.md").read_text()
                self.assertIn(line, text)
                self.assertEqual(text.count("-1.0"), len(comparison.cases))
                self.assertNotIn("stale", text)
                self.assertTrue(text.startswith("before\n") and text.endswith("\nafter\n"))

    def test_the_page_has_a_place_for_every_comparison_and_says_how_to_run_it(self):
        text = (HERE.parent.parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
        for comparison in COMPARISONS:
            self.assertEqual(text.count(f"<!-- {comparison.name}: begin -->"), 1)
            self.assertEqual(text.count(f"<!-- {comparison.name}: end -->"), 1)
            self.assertIn(f"run.py --{comparison.name} ", text)

    def test_layers_and_rounds_of_a_scope_reach_the_job(self):
        for arm, setting in scoped((2, 3), 9).items():
            text = specification(Run(arm, setting, 1), QUICK)
            self.assertIn("layers = [2, 3]", text)
            self.assertIn("count = 9", text)

    def test_strengths_differ_from_the_selected_setting_in_mu_alone(self):
        grid = next(arm.grid for arm in ARMS if arm.name == "fedmcp")
        selected = specification(Run("fedmcp", with_strength(1.0)["fedmcp"], 1), QUICK)
        self.assertIn(selected, [specification(Run("fedmcp", setting, 1), QUICK) for setting in grid])
        for mu in (0.0, 0.03):
            text = specification(Run("fedmcp", with_strength(mu)["fedmcp"], 1), QUICK)
            self.assertEqual(text, selected.replace("mu = 1.0", f"mu = {mu}"))
            self.assertNotEqual(text, selected)


class Compare(unittest.TestCase):
    def test_what_is_in_several_cases_is_run_once_and_each_case_has_its_own_scores(self):
        asked = []

        class Bench:
            sizes = QUICK

            def tasks(self, seed, names):
                asked.append(seed)

            def run_all(self, runs, what):
                asked.append([one.name() for one in runs])
                accuracy = {one: one.setting.algorithm.get("mu", 0.5) for one in runs}
                return {one: {"silos": [{"best_validation": {"accuracy": value}}]} for one, value in accuracy.items()}

        comparison = next(one for one in COMPARISONS if one.name == "mu")
        scores = run.compare(Bench(), comparison)
        self.assertEqual([by_arm["fedmcp"] for by_arm in scores], list(STRENGTHS))
        self.assertEqual({by_arm["local"] for by_arm in scores}, {0.5})
        self.assertEqual(asked[0], QUICK.selection_seed)
        self.assertEqual(len(asked[1]), len(STRENGTHS) + 1)
        self.assertEqual(len(set(asked[1])), len(asked[1]))


class Specification(unittest.TestCase):
    def test_every_setting_has_a_name_of_its_own_and_goes_into_the_job(self):
        runs = [Run(arm.name, setting, 1) for arm in ARMS for setting in arm.grid]
        self.assertEqual(len({one.name() for one in runs}), len(runs))
        for one in runs:
            self.assertIn(f'name = "{one.setting.algorithm["name"]}"', specification(one, QUICK))


if __name__ == "__main__":
    unittest.main()
