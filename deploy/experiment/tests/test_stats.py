"""Tests of the verdict's arithmetic."""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stats  # noqa: E402


class Verdict(unittest.TestCase):
    def test_each_row_of_the_table_can_be_reached(self):
        self.assertEqual(stats.verdict(2.0, 0.5, 3.0), "the claim holds here")
        self.assertEqual(stats.verdict(1.0, 0.5, 1.5), "better than the best baseline, by less than claimed")
        self.assertEqual(stats.verdict(2.0, -0.1, 4.0), "no difference shown")
        self.assertEqual(stats.verdict(-2.0, -3.0, -1.0), "worse than the best baseline")

    def test_an_interval_that_touches_zero_shows_nothing(self):
        self.assertEqual(stats.verdict(1.6, 0.0, 3.0), "no difference shown")


class Differences(unittest.TestCase):
    def test_they_are_in_points_and_paired_by_task_and_seed(self):
        ours = {("a", 1): 0.8, ("a", 2): 0.7, ("b", 1): 0.5, ("b", 2): 0.5}
        theirs = {("a", 1): 0.7, ("a", 2): 0.7, ("b", 1): 0.6, ("b", 2): 0.5}
        by_task = stats.paired_differences(ours, theirs)
        self.assertAlmostEqual(by_task["a"][0], 10.0)
        self.assertAlmostEqual(by_task["b"][0], -10.0)
        self.assertAlmostEqual(stats.mean_of(by_task), 0.0)

    def test_unpaired_runs_are_refused(self):
        with self.assertRaises(ValueError):
            stats.paired_differences({("a", 1): 0.8}, {("a", 2): 0.8})


class Interval(unittest.TestCase):
    def test_it_repeats_and_holds_the_mean(self):
        by_task = {"a": [1.0, 2.0, 3.0], "b": [0.0, 1.0, 2.0], "c": [2.0, 2.5, 3.0]}
        low, high = stats.bootstrap_interval(by_task, draws=2000)
        self.assertEqual((low, high), stats.bootstrap_interval(by_task, draws=2000))
        self.assertLess(low, stats.mean_of(by_task))
        self.assertGreater(high, stats.mean_of(by_task))

    def test_equal_differences_have_no_width(self):
        self.assertEqual(stats.bootstrap_interval({"a": [1.0, 1.0], "b": [1.0, 1.0]}, draws=100), (1.0, 1.0))


if __name__ == "__main__":
    unittest.main()
