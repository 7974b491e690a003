"""Plots: well-formed, inside their frame, and honest about gaps and intervals."""

import re
import unittest
import xml.etree.ElementTree as ElementTree

import context  # noqa: F401
import svg
from svg import DotRow, Mark, Reference, Series

SPACE = "{http://www.w3.org/2000/svg}"


def parsed(plot):
    return ElementTree.fromstring(plot)


def numbers(root, tag, *names):
    return [float(element.get(name)) for element in root.iter(SPACE + tag) for name in names]


class TicksTest(unittest.TestCase):
    def test_ticks_are_round_and_enclose_the_range(self):
        self.assertEqual(svg.nice_ticks(0.61, 0.79), [0.6, 0.65, 0.7, 0.75, 0.8])
        for low, high in ((0.0, 1.0), (-0.013, 0.149), (3, 4e6), (0.5, 0.5), (-2, -1)):
            ticks = svg.nice_ticks(low, high)
            self.assertLessEqual(ticks[0], low)
            self.assertGreaterEqual(ticks[-1], high)
            self.assertLess(len(ticks), 9)

    def test_no_range_is_an_error(self):
        for low, high in ((1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))):
            with self.assertRaises(ValueError):
                svg.nice_ticks(low, high)

    def test_a_decimal_that_says_nothing_is_left_out(self):
        self.assertEqual(svg.tick_texts([0.5, 0.6], svg.percent), ["50", "60"])
        self.assertEqual(svg.tick_texts([0.5, 0.525], svg.percent), ["50.0", "52.5"])


class SpreadTest(unittest.TestCase):
    def test_labels_move_apart_in_order_and_stay_inside(self):
        moved = svg.spread([50, 51, 49, 99], 12, 0, 100)
        ordered = sorted(moved)
        self.assertTrue(all(b - a >= 12 - 1e-6 for a, b in zip(ordered, ordered[1:])))
        self.assertLess(moved[2], moved[0])
        self.assertLess(moved[0], moved[1])
        self.assertGreaterEqual(ordered[0], 0)
        self.assertLessEqual(ordered[-1], 100 + 1e-6)

    def test_labels_that_are_apart_stay_where_they_are(self):
        self.assertEqual(svg.spread([10, 60], 12, 0, 100), [10, 60])


class LinePlotTest(unittest.TestCase):
    def plot(self, ys, **settings):
        return svg.line_plot([Series("A <b> & c", list(range(1, len(ys) + 1)), ys)], title='"T" & <t>', **settings)

    def test_it_is_well_formed_with_any_name(self):
        root = parsed(self.plot([0.1, 0.2]))
        self.assertIn("A <b> & c 20.0", "".join(root.itertext()))

    def test_every_point_lies_inside_the_frame(self):
        root = parsed(self.plot([0.0, 0.5, 1.0], references=[Reference("low", -0.2), Reference("high", 1.4)]))
        width, height = float(root.get("width")), float(root.get("height"))
        self.assertTrue(all(0 <= x <= width for x in numbers(root, "circle", "cx")))
        self.assertTrue(all(0 <= y <= height for y in numbers(root, "circle", "cy")))

    def test_higher_values_stand_higher(self):
        first, second, third = numbers(parsed(self.plot([0.1, 0.3, 0.2])), "circle", "cy")
        self.assertLess(second, third)
        self.assertLess(third, first)

    def test_a_gap_breaks_the_line(self):
        root = parsed(self.plot([0.1, 0.2, None, 0.3, 0.4]))
        self.assertEqual(len(list(root.iter(SPACE + "polyline"))), 2)
        self.assertEqual(len(list(root.iter(SPACE + "circle"))), 4)

    def test_a_single_round_is_a_dot(self):
        root = parsed(self.plot([0.4]))
        self.assertEqual(len(list(root.iter(SPACE + "polyline"))), 0)
        self.assertEqual(len(list(root.iter(SPACE + "circle"))), 1)

    def test_an_interval_is_drawn_as_a_band(self):
        plain = Series("a", [1, 2], [0.1, 0.2])
        banded = Series("a", [1, 2], [0.1, 0.2], [0.05, 0.1], [0.2, 0.3])
        self.assertNotIn("<polygon", svg.line_plot([plain]))
        self.assertIn("<polygon", svg.line_plot([banded]))

    def test_nothing_to_draw_is_an_error(self):
        with self.assertRaises(ValueError):
            self.plot([None, None])
        with self.assertRaises(ValueError):
            svg.line_plot([])

    def test_many_rounds_do_not_crowd_the_axis_and_the_last_is_named(self):
        root = parsed(self.plot([0.1 + n / 1000 for n in range(100)]))
        named = [e.text for e in root.iter(SPACE + "text") if e.get("text-anchor") == "middle" and re.fullmatch(r"\d+", e.text)]
        self.assertLess(len(named), 20)
        self.assertEqual(named[-1], "100")


class DotPlotTest(unittest.TestCase):
    def test_a_whisker_spans_its_interval(self):
        root = parsed(svg.dot_plot([DotRow("r", [Mark(0.5, 0.4, 0.7)])], x_range=(0, 1)))
        dot = numbers(root, "circle", "cx")[0]
        left, right = next(
            (float(line.get("x1")), float(line.get("x2")))
            for line in root.iter(SPACE + "line")
            if line.get("class") == "whisker" and line.get("y1") == line.get("y2")
        )
        self.assertLess(left, dot)
        self.assertAlmostEqual((right - dot) / (dot - left), 2.0, delta=0.05)

    def test_a_dot_without_an_interval_has_no_whisker(self):
        self.assertNotIn("whisker", svg.dot_plot([DotRow("r", [Mark(0.5)])]))

    def test_negative_differences_stand_left_of_zero_with_a_true_minus(self):
        plot = svg.dot_plot([DotRow("r", [Mark(-0.01)])], reference=Reference("zero", 0.0))
        self.assertIn("\u2212", plot)


class StandaloneTest(unittest.TestCase):
    def test_a_file_of_its_own_carries_its_style_and_refers_to_nothing_outside(self):
        text = svg.standalone(svg.line_plot([Series("a", [1, 2], [0.1, 0.2])]))
        root = parsed(text)
        self.assertEqual(next(iter(root)).tag, SPACE + "style")
        self.assertIn("prefers-color-scheme: dark", text)
        self.assertNotRegex(text.replace("http://www.w3.org/2000/svg", ""), r"https?:|url\(|@import|<script")


if __name__ == "__main__":
    unittest.main()
