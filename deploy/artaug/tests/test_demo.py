"""The ArtAug demo: its job and settings, what it shows of a job, and the table at the end."""

import importlib.util
import sys
import unittest
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "demo.py"
# By path: deploy/demo has modules of the same names.
SPEC = importlib.util.spec_from_file_location("artaug_demo", SCRIPT)
demo = importlib.util.module_from_spec(SPEC)
sys.modules["artaug_demo"] = demo
SPEC.loader.exec_module(demo)


def job(**progress):
    text = {"job": {"job_id": "j", "state": "running", "reason": "", "artaug": progress or None}}
    return demo.parse_job(demo.json.dumps(text))


class Showing(unittest.TestCase):
    def test_a_job_without_a_worker_says_so(self):
        self.assertIn("waiting for the worker", demo.line(job(), 3.0, 80))

    def test_a_stage_has_a_bar_its_counts_and_the_time_left(self):
        text = demo.line(job(iteration=1, iterations=2, stage="generate", done=48, total=192, remaining_seconds=65.0), 30.0, 200)
        for part in ("iteration 1 of 2", "generate", "48/192", "1:05 left", "0:30"):
            self.assertIn(part, text)

    def test_a_stage_without_a_total_has_only_a_count(self):
        text = demo.line(job(iteration=1, iterations=2, stage="train-first", done=40, total=0), 30.0, 200)
        self.assertIn("40", text)
        self.assertNotIn("/0", text)

    def test_a_line_is_never_wider_than_the_screen(self):
        text = demo.line(job(iteration=1, iterations=2, stage="generate", done=48, total=192), 30.0, 40)
        self.assertLessEqual(len(text), 40)


class Table(unittest.TestCase):
    SUMMARY = {
        "iteration": 1,
        "raw_gain": {"mean": 0.2, "low": 0.1, "high": 0.3, "pairs": 10},
        "kept": 8,
        "arms": {
            "base": {"score": -0.5, "gain": {"mean": 0, "low": 0, "high": 0}, "wins": {"wins": 0, "ties": 10, "losses": 0}, "alignment": 0.3, "diversity": 0.4},
            "enhanced": {"score": -0.4, "gain": {"mean": 0.1, "low": 0.05, "high": 0.15}, "wins": {"wins": 6, "ties": 2, "losses": 2}, "alignment": None, "diversity": 0.38, "nearest": {"arm": 0.12, "base": 0.13, "near": 0.06}},
        },
    }

    def test_an_arm_has_its_gain_with_the_interval_and_its_win_rate_with_half_of_the_ties(self):
        text = "\n".join(demo.table([self.SUMMARY]))
        self.assertIn("+0.100 (+0.050 to +0.150)", text)
        self.assertRegex(text, r"70 % +2 ")
        self.assertIn("8 pairs kept", text)
        self.assertIn("0.120 (base 0.130; 6 % near)", text)

    def test_what_was_not_measured_is_a_dash_and_what_was_not_run_is_left_out(self):
        lines = demo.table([self.SUMMARY])
        enhanced = next(line for line in lines if "enhanced" in line)
        self.assertIn("–", enhanced)
        self.assertFalse(any("plain LoRA" in line for line in lines))


class Settings(unittest.TestCase):
    def test_the_worker_may_use_the_base_model_and_the_prompts_and_nothing_else(self):
        commands = demo.Commands(Path("/programs"), Path("/demo"), Path("/cache"), 1, 2)
        text = commands.worker_config(Path("/demo/prompts"), demo.Settings())
        self.assertIn(f'model_folders = ["{SCRIPT.parent}"]', text)
        self.assertIn('prompt_folders = ["/demo/prompts"]', text)

    def test_the_job_asks_for_what_the_settings_say(self):
        text = demo.job_spec(demo.Settings(iterations=3, pairs=7, held_out=9, seed=5))
        for part in ("iterations = 3", "pairs = 7", "held_out = 9", "seed = 5", 'kind = "artaug"'):
            self.assertIn(part, text)

    def test_the_job_is_the_one_whose_figures_stand_on_the_page(self):
        text = demo.job_spec(demo.Settings())
        wanted = ("guidance = 1.0", "subject_below = -1.0", "region_strength = 1.0", "first_steps = 240", "second_steps = 120", "kept = 24", "held_out = 200")
        for part in wanted:
            self.assertIn(part, text)


if __name__ == "__main__":
    unittest.main()
