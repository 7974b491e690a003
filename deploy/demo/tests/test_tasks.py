"""Splits, sampling and the files of a task."""

import contextlib
import csv
import io
import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import context  # noqa: F401
import sources
import tasks
from sources import Row
from tasks import SPLITS, Task, TaskError

COUNTS = {"train": 30, "validation": 8, "test": 12}


def rows(count=400, classes=("a", "b", "c"), group_size=4):
    return [
        Row(str(n), f"group {n // group_size}", (f"text {n}",), classes[n % len(classes)], f"text {n}")
        for n in range(count)
    ]


def toy(problem="classification", kind="single", read=lambda _: iter(rows())):
    return Task("toy", "A toy", "vader", "MIT", read, kind=kind, problem=problem)


class SplitTest(unittest.TestCase):
    def test_splits_share_no_row_no_text_and_no_group(self):
        splits = tasks.splits_of(toy(), rows())
        self.assertEqual(sum(len(found) for found in splits.values()), 400)
        for one in SPLITS:
            self.assertTrue(splits[one])
            for other in SPLITS:
                if one != other:
                    for field in ("id", "group", "texts"):
                        shared = {getattr(r, field) for r in splits[one]} & {getattr(r, field) for r in splits[other]}
                        self.assertEqual(shared, set(), f"{field} of {one} and {other}")

    def test_sixty_fifteen_twenty_five(self):
        splits = tasks.splits_of(toy(), rows(6000, group_size=1))
        self.assertAlmostEqual(len(splits["train"]) / 6000, 0.60, delta=0.02)
        self.assertAlmostEqual(len(splits["test"]) / 6000, 0.25, delta=0.02)

    def test_the_split_depends_on_source_and_group_alone(self):
        other = Task("other", "Other", "vader", "MIT", lambda _: iter(()))
        self.assertEqual(tasks.splits_of(toy(), rows()), tasks.splits_of(other, rows()))

    def test_the_same_text_in_two_groups_stays_once(self):
        doubled = rows() + [Row(f"copy {n}", f"other group {n}", (f"TEXT  {n}",), "abc"[n % 3], f"text {n}") for n in range(400)]
        splits = tasks.splits_of(toy(), doubled)
        texts = [sources.text_key(*row.texts) for found in splits.values() for row in found]
        self.assertEqual(len(texts), len(set(texts)))
        self.assertEqual(len(texts), 400)

    def test_a_text_with_two_labels_goes_but_a_text_with_two_ratings_stays_once(self):
        twice = [Row("1", "g", ("t",), "0.5", "t"), Row("2", "g", ("t",), "0.7", "t")]
        self.assertEqual(tasks.without_duplicates(twice), [])
        self.assertEqual(tasks.without_duplicates(twice, ratings=True), twice[:1])

    def test_empty_texts_go(self):
        self.assertEqual(tasks.without_duplicates([Row("1", "g", ("",), "a", "")]), [])

    def test_the_first_text_of_a_pair_stays_in_one_split(self):
        pairs = [Row(f"{n}", f"group {n}", ("same example", f"gloss {n}"), "match", f"{n}") for n in range(50)]
        splits = tasks.splits_of(toy(kind="pair"), pairs)
        self.assertEqual(len([split for split in SPLITS if splits[split]]), 1)


class SampleTest(unittest.TestCase):
    def test_the_same_seed_gives_the_same_rows_and_another_seed_others(self):
        one, again, other = (tasks.sample(toy(), rows(), 50, seed, False) for seed in (1, 1, 2))
        self.assertEqual(one, again)
        self.assertNotEqual(one, other)

    def test_the_order_of_the_source_does_not_matter(self):
        self.assertEqual(
            tasks.sample(toy(), rows(), 50, 0, True), tasks.sample(toy(), list(reversed(rows())), 50, 0, True)
        )

    def test_a_larger_sample_contains_the_smaller_one(self):
        small, large = (tasks.sample(toy(), rows(), count, 0, False) for count in (20, 60))
        self.assertLess({row.id for row in small}, {row.id for row in large})

    def test_zero_is_all(self):
        self.assertEqual(len(tasks.sample(toy(), rows(), 0, 0, True)), 400)

    def test_a_rare_class_is_in_every_training_sample(self):
        rare = rows(classes=("a",)) + [Row("rare", "g", ("rare text",), "rare", "rare text")]
        for seed in range(20):
            chosen = tasks.sample(toy(), rare, 10, seed, True)
            self.assertEqual(len(chosen), 10)
            self.assertIn("rare", [row.label for row in chosen])

    def test_fewer_rows_than_classes_is_an_error(self):
        with self.assertRaisesRegex(TaskError, "2 training rows cannot hold its 3 classes"):
            tasks.sample(toy(), rows(), 2, 0, True)


class FilesTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.out = Path(temporary.name) / "out"

    def read(self, split):
        with open(self.out / "toy" / f"{split}.csv", encoding="utf-8", newline="") as stream:
            return list(csv.reader(stream))

    def test_files_hold_what_the_entry_says(self):
        entry = tasks.make_task(toy(), rows(), self.out, COUNTS, 0)
        self.assertEqual(entry["rows"], COUNTS)
        self.assertEqual(entry["classes"], ["a", "b", "c"])
        for split in SPLITS:
            found = self.read(split)
            self.assertEqual(found[0], ["text", "label"])
            self.assertEqual(len(found) - 1, COUNTS[split])
        labels = [row[1] for row in self.read("test")[1:]]
        self.assertAlmostEqual(entry["majority"], max(map(labels.count, "abc")) / 12, places=6)

    def test_text_with_quotes_commas_and_any_script_comes_back(self):
        odd = 'a "quoted", \u5357\u4eac'
        made = [Row(str(n), str(n), (f"{odd} {n}",), "a", str(n)) for n in range(100)]
        tasks.make_task(toy(), made, self.out, COUNTS, 0)
        self.assertTrue(all(row[0].startswith(odd) for row in self.read("train")[1:]))

    def test_a_regression_task_has_ratings_and_no_majority(self):
        made = [Row(str(n), str(n), (f"t {n}",), f"{n / 10:.4f}", f"t {n}") for n in range(100)]
        entry = tasks.make_task(toy("regression"), made, self.out, COUNTS, 0)
        self.assertEqual((entry["classes"], entry["majority"]), ([], None))
        float(self.read("test")[1][1])

    def test_a_pair_task_has_three_columns(self):
        made = [Row(str(n), str(n), (f"a {n}", f"b {n}"), "match", str(n)) for n in range(100)]
        tasks.make_task(toy(kind="pair"), made, self.out, COUNTS, 0)
        self.assertEqual(self.read("train")[0], ["text_a", "text_b", "label"])

    def test_a_label_without_training_rows_is_an_error_and_leaves_nothing(self):
        only_tested = next(f"g{n}" for n in range(1000) if tasks.split_of("vader", f"g{n}") == "test")
        made = rows() + [Row("x", only_tested, ("x",), "unseen", "x")]
        with self.assertRaisesRegex(TaskError, "no training row has the label unseen"):
            tasks.make_task(toy(), made, self.out, dict(COUNTS, test=0), 0)
        self.assertFalse(self.out.exists())

    def test_a_failed_write_keeps_the_old_folder_and_leaves_nothing_half_made(self):
        tasks.make_task(toy(), rows(), self.out, COUNTS, 0)
        before = self.read("train")
        with mock.patch.object(tasks.csv, "writer", side_effect=OSError("disk full")):
            with self.assertRaises(OSError):
                tasks.make_task(toy(), rows(), self.out, COUNTS, 1)
        self.assertEqual(self.read("train"), before)
        self.assertEqual([path.name for path in self.out.iterdir()], ["toy"])


class CommandTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.cache, self.out = Path(temporary.name) / "cache", Path(temporary.name) / "out"
        (self.cache / "sources" / "vader").mkdir(parents=True)
        self.reads = 0

    def run_main(self, *extra):
        def read(_):
            self.reads += 1
            return iter(rows())

        said, complaints = io.StringIO(), io.StringIO()
        arguments = ["--out", str(self.out), "--cache", str(self.cache), "--tasks", "toy", "--train", "30", *extra]
        with mock.patch.object(tasks, "TASKS", (toy(read=read),)):
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
                try:
                    code = tasks.main(arguments)
                except SystemExit as error:
                    code = error.code
        return code, said.getvalue(), complaints.getvalue()

    def test_a_second_run_does_nothing_until_an_option_or_a_file_changes(self):
        self.assertEqual(self.run_main()[0], 0)
        self.assertIn("already there", self.run_main()[1])
        self.assertEqual(self.reads, 1)
        self.run_main("--seed", "1")
        self.assertEqual(self.reads, 2)
        (self.out / "toy" / "train.csv").write_text("text,label\n")
        self.run_main("--seed", "1")
        self.assertEqual(self.reads, 3)

    def test_tasks_json_lists_the_task(self):
        self.run_main()
        written = json.loads((self.out / "tasks.json").read_text())
        self.assertEqual([entry["name"] for entry in written["tasks"]], ["toy"])
        self.assertEqual(written["tasks"][0]["package"], "vaderSentiment 3.3.2")

    def test_a_missing_source_is_named(self):
        (self.cache / "sources" / "vader").rmdir()
        code, _, complaint = self.run_main()
        self.assertEqual(code, 1)
        self.assertIn("run fetch.py first", complaint)
        self.assertFalse((self.out / "tasks.json").exists())

    def test_an_unknown_task_is_refused(self):
        code, _, complaint = self.run_main("--tasks", "toys")
        self.assertEqual(code, 2)
        self.assertIn("unknown task: toys", complaint)


if __name__ == "__main__":
    unittest.main()
