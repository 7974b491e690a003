"""The report page: complete, self-contained, and strict about its input."""

import contextlib
import copy
import io
import json
import tempfile
import unittest
from html.parser import HTMLParser
from pathlib import Path

import context  # noqa: F401
import report
from report import ReportError

SILO = {
    "name": "silo-1",
    "task": "spam",
    "title": "E-mail <spam> & ham",
    "metric": "accuracy",
    "train_rows": 1000,
    "test_rows": 900,
    "majority": 0.5,
    "local": 0.8,
    "final": 0.85,
    "rounds": [0.7, None, 0.84],
    "local_rounds": [0.6, 0.7, 0.8],
    "majority_validation": 0.52,
    "bytes_up": 1_000_000,
    "bytes_down": 2_000_000,
    "seconds": 65.0,
}
REGRESSION = dict(SILO, name="silo-2", title="Ratings", metric="spearman", majority=None, majority_validation=None, local=0.6, final=0.55, rounds=[0.3, 0.5, 0.5])
REPORT = {
    "schema": 1,
    "job": {
        "id": "j1",
        "name": "demo",
        "algorithm": "fedmcp",
        "backbone": "all-MiniLM-L6-v2",
        "rounds": 3,
        "seconds": 181.0,
        "facts": [["bottleneck", "16"]],
    },
    "silos": [SILO, REGRESSION],
    "server": {"peak_rss_bytes": 31_000_000, "libtorch_mapped": False},
}


class Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


class PageTest(unittest.TestCase):
    def setUp(self):
        self.page = report.render(REPORT)

    def test_tags_close_and_nothing_is_loaded_from_elsewhere(self):
        tags = Tags()
        tags.feed(self.page)
        self.assertEqual(tags.open, [])
        names = {tag for tag, _ in tags.seen}
        self.assertFalse(names & {"script", "link", "img", "iframe", "object"})
        for _, attributes in tags.seen:
            self.assertFalse({"href", "src"} & set(attributes))

    def test_each_silo_has_a_panel_and_a_row(self):
        self.assertEqual(self.page.count("<tbody><tr>") + self.page.count("</tr><tr>"), 2)
        self.assertEqual(self.page.count("<svg"), 3)

    def test_names_are_escaped(self):
        self.assertIn("E-mail &lt;spam&gt; &amp; ham", self.page)
        self.assertNotIn("<spam>", self.page)

    def test_totals_are_the_sums_of_the_silos(self):
        self.assertIn(">2.0 MB<", self.page)
        self.assertIn(">4.0 MB<", self.page)

    def test_gains_are_points_over_local_with_a_true_minus(self):
        self.assertAlmostEqual(report.gain_of(SILO), 5.0)
        self.assertAlmostEqual(report.gain_of(REGRESSION), -5.0)
        self.assertIn("+5.0", self.page)
        self.assertIn("\u22125.0", self.page)
        self.assertIn("1 of 2", self.page)

    def test_plots_show_validation_and_the_table_test_rows(self):
        self.assertIn("FedMCP 84.0", self.page)
        self.assertIn("Local 80.0", self.page)
        self.assertIn("Majority 52.0", self.page)
        self.assertIn('<td class="main">85.0</td>', self.page)
        self.assertIn("<td>50.0</td>", self.page)

    def test_without_local_no_gain_is_claimed(self):
        bare = copy.deepcopy(REPORT)
        for silo in bare["silos"]:
            silo["local"] = None
        self.assertNotIn("on average", report.render(bare))


class CheckTest(unittest.TestCase):
    def refused(self, message, change):
        broken = copy.deepcopy(REPORT)
        change(broken)
        with self.assertRaisesRegex(ReportError, message):
            report.render(broken)

    def test_each_fault_is_named(self):
        self.refused("schema", lambda r: r.update(schema=2))
        self.refused("silos: expected", lambda r: r.update(silos=[]))
        self.refused(r"silos\[1\]\.bytes_up", lambda r: r["silos"][1].pop("bytes_up"))
        self.refused(r"silos\[0\]\.metric", lambda r: r["silos"][0].update(metric="loss"))
        self.refused(r"silos\[0\]\.rounds: no round", lambda r: r["silos"][0].update(rounds=[None]))
        self.refused(r"silos\[0\]\.final", lambda r: r["silos"][0].update(final=None))
        self.refused("job.rounds", lambda r: r["job"].update(rounds="3"))
        self.refused("server: missing", lambda r: r.pop("server"))


class TextTest(unittest.TestCase):
    def test_small_numbers_are_words(self):
        self.assertEqual([report.count_word(n) for n in (1, 6, 13)], ["One", "Six", "13"])

    def test_sizes_and_times_for_people(self):
        self.assertEqual(report.bytes_text(999), "999 B")
        self.assertEqual(report.bytes_text(1500), "1.5 kB")
        self.assertEqual(report.bytes_text(304512), "305 kB")
        self.assertEqual(report.bytes_text(7.2e9), "7.2 GB")
        self.assertEqual(report.seconds_text(3.21), "3.2 s")
        self.assertEqual(report.seconds_text(119.4), "119 s")
        self.assertEqual(report.seconds_text(184.2), "3 min 04 s")


class CommandTest(unittest.TestCase):
    def test_the_page_stands_beside_the_json_and_a_bad_json_writes_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.json"
            path.write_text("{}")
            with contextlib.redirect_stderr(io.StringIO()) as complaint:
                self.assertEqual(report.main([str(path)]), 1)
            self.assertIn("report.json: schema: expected 1", complaint.getvalue())
            self.assertEqual([p.name for p in Path(folder).iterdir()], ["report.json"])
            path.write_text(json.dumps(REPORT))
            with contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual(report.main([str(path)]), 0)
            self.assertTrue((Path(folder) / "report.html").read_text().startswith("<!doctype html>"))


if __name__ == "__main__":
    unittest.main()
