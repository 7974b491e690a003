"""What the demo shows: bars, frames and the table."""

import io
import unittest

import context  # noqa: F401
import progress
from progress import Screen, SiloLine

LINES = [
    SiloLine("E-mail: spam or ham", 2, 4, "training", "accuracy", 0.951, (0.8, 0.951)),
    SiloLine("Ratings", 0, 4, "waiting", "spearman"),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class FrameTest(unittest.TestCase):
    def test_a_bar_is_full_in_proportion_and_never_overflows(self):
        self.assertEqual(progress.bar(2, 4, 8), "████░░░░")
        self.assertEqual(progress.bar(9, 4, 4), "████")
        self.assertEqual(progress.bar(0, 0, 4), "░░░░")

    def test_a_sparkline_goes_from_low_to_high_with_gaps(self):
        self.assertEqual(progress.spark([0.1, None, 0.5]), "▁ █")
        self.assertEqual(progress.spark([]), "")
        self.assertEqual(progress.spark([0.3, 0.3]), "▁▁")

    def test_a_frame_says_where_each_silo_is(self):
        text = "\n".join(progress.frame("round 3 of 4", 67, LINES))
        self.assertIn("round 3 of 4   1:07", text)
        self.assertRegex(text, r"E-mail: spam or ham +█+░+ +2/4 +training +accuracy 95.1 +▁█")
        self.assertRegex(text, r"Ratings +░+ +0/4 +waiting")

    def test_a_bar_moves_within_a_round(self):
        half = SiloLine("E-mail", 2, 4, "training", part=0.5)
        lines = progress.frame("round 3 of 4", 67, [half, SiloLine("E-mail", 2, 4, "training")])
        self.assertGreater(lines[2].count("█"), lines[3].count("█"))

    def test_no_line_is_wider_than_asked(self):
        for width in (30, 60, 100):
            for line in progress.frame("a headline that is rather long " * 3, 5, LINES, width):
                self.assertLessEqual(len(line), width)


class TableTest(unittest.TestCase):
    def test_columns_line_up_and_the_mean_gain_is_given(self):
        silo = {
            "title": "E-mail", "metric": "accuracy", "majority": 0.5, "local": 0.8, "final": 0.85, "bytes_up": 1000,
            "bytes_down": 2000, "seconds": 5.0, "peak_rss_bytes": 412_000_000,
        }
        rating = dict(silo, title="A longer name", metric="spearman", majority=None, local=None, final=0.512)
        lines = progress.table({"silos": [silo, rating], "server": {"peak_rss_bytes": 30_000_000, "libtorch_mapped": False}})
        self.assertEqual(len({len(line) for line in lines[:4]}), 1)
        self.assertRegex(lines[2], r"E-mail +accuracy +50.0 +80.0 +85.0 +\+5.0 +1.0 kB +2.0 kB +5.0 s")
        self.assertRegex(lines[3], r"A longer name +Spearman +– +– +0.512 +–")
        self.assertIn("mean gain over Local: +5.0 points", lines[5])
        self.assertEqual(lines[6], "server memory at its peak: 30.0 MB, no libtorch mapped")
        self.assertEqual(lines[7], "largest silo daemon at its peak: 412 MB")


class ScreenTest(unittest.TestCase):
    def test_a_terminal_frame_is_drawn_over_the_one_before(self):
        stream = Terminal()
        screen = Screen(stream)
        screen.show("one", 1, LINES)
        self.assertNotIn("\x1b", stream.getvalue())
        screen.show("two", 2, LINES)
        self.assertIn("\x1b[4F\x1b[J", stream.getvalue())

    def test_a_kept_frame_is_not_overwritten(self):
        stream = Terminal()
        screen = Screen(stream)
        screen.show("one", 1, LINES)
        screen.keep()
        screen.say("after")
        self.assertNotIn("\x1b", stream.getvalue())

    def test_without_a_terminal_the_last_frame_is_written_when_it_is_kept(self):
        stream = io.StringIO()
        screen = Screen(stream)
        screen.show("one", 1, LINES)
        screen.show("one", 9, LINES)
        self.assertNotIn("0:09", stream.getvalue())
        screen.keep()
        screen.keep()
        self.assertEqual(stream.getvalue().count("0:09"), 1)

    def test_without_a_terminal_only_changes_are_written_and_no_escapes(self):
        stream = io.StringIO()
        screen = Screen(stream)
        screen.show("one", 1, LINES)
        before = stream.getvalue()
        screen.show("one", 2, LINES)
        self.assertEqual(stream.getvalue(), before)
        screen.show("two", 3, LINES)
        self.assertIn("two", stream.getvalue())
        self.assertNotIn("\x1b", stream.getvalue())


if __name__ == "__main__":
    unittest.main()
