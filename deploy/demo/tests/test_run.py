"""The orchestrator over stand-in programs, and the pure pieces around it."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import context
import cli
import fakes
import report
import run
import tasks
from cli import JobView, Settings, Silo, SiloView
from fakes import FakeCommands
from procs import Processes, ProcessError, free_ports
from progress import Screen

TASK = {
    "name": "spam",
    "title": "E-mail",
    "kind": "single",
    "problem": "classification",
    "rows": {"train": 512, "validation": 200, "test": 500},
    "majority": 0.5,
    "majority_validation": 0.52,
}
PAIR = dict(TASK, name="gloss-pair", title="Pairs", kind="pair")
SILOS = [Silo("spam", TASK), Silo("gloss-pair", PAIR)]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class DemoTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.work = run.prepare_work(self.folder)
        faster = mock.patch.object(run, "POLL_EVERY", 0.01)
        faster.start()
        self.addCleanup(faster.stop)

    def demo(self, **fate):
        screen = io.StringIO()
        with mock.patch.dict(os.environ, {"FAKE": json.dumps(fate)}), Processes(self.folder / "logs") as processes:
            commands = FakeCommands(Path("/"), self.work, *free_ports(2))
            try:
                return run.Demo(commands, processes, Screen(screen), SILOS, Settings()).run(Path("/tasks"), Path("/backbone"))
            finally:
                self.shown = screen.getvalue()
                self.killed = processes.stop_all(patience=0.5)

    def pids(self):
        return [int(line) for line in (self.work / "pids").read_text().split()]

    def test_a_whole_run_gives_a_report_that_follows_its_schema(self):
        finished = report.check(self.demo())
        silo = finished["silos"][0]
        self.assertEqual((silo["name"], silo["task"], silo["majority"]), ("spam", "spam", 0.5))
        self.assertAlmostEqual(silo["final"], 0.83)
        self.assertAlmostEqual(silo["local"], 0.73)
        self.assertEqual([round(value, 2) for value in silo["rounds"]], [0.71, 0.72, 0.73])
        self.assertEqual([round(value, 2) for value in silo["local_rounds"]], [0.61, 0.62, 0.63])
        self.assertEqual((silo["bytes_up"], silo["bytes_down"]), (300, 270))
        self.assertEqual(finished["job"]["adapter_bytes"], 100)
        self.assertGreater(finished["server"]["peak_rss_bytes"], 1_000_000)
        self.assertIs(finished["server"]["libtorch_mapped"], False)
        self.assertFalse([pid for pid in self.pids() if alive(pid)])

    def test_the_silos_have_the_six_tasks_that_are_promised(self):
        promised = ("spam", "tweet-sentiment", "movie-polarity", "plot-vs-review", "supersense", "gloss-pair")
        self.assertEqual(run.DEMO_TASKS, promised)
        kinds = {task.name: (task.kind, task.problem) for task in tasks.TASKS}
        self.assertEqual(kinds["gloss-pair"], ("pair", "classification"))
        self.assertEqual({kinds[name] for name in promised[:-1]}, {("single", "classification")})

    def test_progress_is_shown_for_every_silo_and_round(self):
        self.demo()
        for expected in ("round 1 of 3", "all 3 rounds are published", "E-mail", "Pairs", "done"):
            self.assertIn(expected, self.shown)

    def test_a_daemon_that_dies_ends_the_demo_with_its_last_words(self):
        with self.assertRaisesRegex(ProcessError, r"spam ended on its own[^$]*cannot read the backbone"):
            self.demo(dies="spam", job="hangs")
        self.assertFalse([pid for pid in self.pids() if alive(pid)])

    def test_a_failed_job_ends_the_demo_with_the_servers_reason(self):
        with self.assertRaisesRegex(run.DemoError, "the job failed: too few silos"):
            self.demo(job="fails")
        self.assertFalse([pid for pid in self.pids() if alive(pid)])

    def test_a_failure_of_local_ends_the_demo_with_its_last_words(self):
        with self.assertRaisesRegex(ProcessError, r"local-[12] failed[^$]*cannot read the rows"):
            self.demo(local="fails")
        self.assertFalse([pid for pid in self.pids() if alive(pid)])

    def test_a_job_that_never_ends_is_given_up(self):
        with mock.patch.object(run, "JOB_WITHIN", 0.5):
            with self.assertRaisesRegex(run.DemoError, "has not ended within"):
                self.demo(job="hangs")
        self.assertFalse([pid for pid in self.pids() if alive(pid)])

    def test_daemons_have_the_allocators_settings_of_their_unit(self):
        self.assertEqual(cli.allocator("concord-client"), {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "2097152"})
        self.assertIn("MALLOC_TRIM_THRESHOLD_", cli.allocator("concord-server"))

    def test_keys_and_state_are_in_a_folder_for_the_owner_alone(self):
        self.assertEqual(self.work.stat().st_mode & 0o777, 0o700)


# The real main over stand-in programs, as a process of its own, so that it can be sent signals.
DRIVER = f"""
import sys
sys.path[:0] = [{str(context.DEMO)!r}, {str(Path(fakes.SCRIPT).parent)!r}]
from pathlib import Path
import run, fakes, test_run
run.fetch.fetch = lambda *_, **__: None
run.tasks.make_tasks = lambda *_: [silo.task for silo in test_run.SILOS]
run.Commands = fakes.FakeCommands
run.POLL_EVERY = 0.01
sys.exit(run.main(sys.argv[1:]))
"""


class MainTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.out = Path(temporary.name) / "demo"

    def start(self, **fate):
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, "--out", str(self.out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, FAKE=json.dumps(fate)),
        )

    def until_running(self, sign="work/calls"):
        deadline = time.monotonic() + 20
        while not (self.out / sign).exists():
            self.assertLess(time.monotonic(), deadline, "the demo did not get going")
            time.sleep(0.01)

    def pids(self):
        return [int(line) for line in (self.out / "work" / "pids").read_text().split()]

    def test_it_exits_0_and_leaves_table_json_and_page(self):
        with self.start() as demo:
            said, complaints = demo.communicate(timeout=60)
        self.assertEqual((demo.returncode, complaints), (0, ""))
        self.assertRegex(said, r"E-mail +accuracy +50.0 +73.0 +83.0 +\+10.0")
        self.assertEqual(json.loads((self.out / "report.json").read_text())["schema"], report.SCHEMA)
        self.assertIn("</html>", (self.out / "report.html").read_text())
        self.assertFalse([pid for pid in self.pids() if alive(pid)])

    def test_ctrl_c_and_sigterm_stop_everything(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(number):
                with self.start(job="hangs") as demo:
                    self.until_running()
                    demo.send_signal(number)
                    _, complaints = demo.communicate(timeout=60)
                self.assertEqual(demo.returncode, 130, complaints)
                self.assertIn("no process was left running", complaints)
                self.assertFalse([pid for pid in self.pids() if alive(pid)])
                self.assertFalse((self.out / "report.json").exists())
                (self.out / "work" / "calls").unlink()

    def test_ctrl_c_stops_local_too(self):
        with self.start(local="hangs") as demo:
            self.until_running("logs/local-2.log")
            demo.send_signal(signal.SIGINT)
            _, complaints = demo.communicate(timeout=60)
        self.assertEqual(demo.returncode, 130, complaints)
        self.assertFalse([pid for pid in self.pids() if alive(pid)])

    def test_an_error_is_one_sentence_and_no_traceback(self):
        with self.start(job="fails") as demo:
            _, complaints = demo.communicate(timeout=60)
        self.assertEqual(demo.returncode, 1)
        self.assertIn("demo: error: the job failed: too few silos", complaints)
        self.assertNotIn("Traceback", complaints)

    def test_a_second_demo_in_the_same_folder_is_refused(self):
        with self.start(job="hangs") as first:
            self.until_running()
            with self.start() as second:
                _, complaints = second.communicate(timeout=60)
            first.send_signal(signal.SIGINT)
            first.communicate(timeout=60)
        self.assertEqual(second.returncode, 1)
        self.assertIn("another demo is running", complaints)


class ViewTest(unittest.TestCase):
    def job(self, state="running", **view):
        return JobView("j", state, 2, 3, silos={"spam": SiloView(**view)})

    def line(self, job):
        return run.silo_lines(job, SILOS[:1])[0]

    def test_the_state_of_a_bar_follows_the_silo(self):
        tested = {(3, "last_test"): {"accuracy": 0.9}}
        self.assertEqual(self.line(self.job(working=True)).state, "training")
        self.assertEqual(self.line(self.job()).state, "waiting")
        self.assertEqual(self.line(self.job(outcome="rejected")).state, "rejected")
        self.assertEqual(self.line(self.job("succeeded")).state, "testing")
        self.assertEqual(self.line(self.job("succeeded", metrics=tested)).state, "done")
        self.assertEqual(self.line(self.job("cancelled")).state, "cancelled")
        self.assertEqual(run.silo_lines(JobView("j", "queued", 0, 3), SILOS)[0].state, "waiting")

    def test_a_daemons_own_word_and_steps_move_its_bar(self):
        def line(own, **view):
            return run.silo_lines(self.job(working=True, **view), SILOS[:1], {"spam": own})[0]

        self.assertEqual(line(cli.Doing("downloading", 2, 0, 0), accepted=1).state, "downloading")
        self.assertEqual(line(cli.Doing("training", 2, 8, 32), accepted=1).part, 0.25)
        self.assertEqual(line(cli.Doing("training", 2, 8, 32), accepted=2).part, 0.0)

    def test_the_newest_metric_and_its_history_are_shown_without_rounds_to_come(self):
        metrics = {(n, "after_aggregation"): {"accuracy": 0.7 + n / 100} for n in (1, 2)}
        line = self.line(self.job(metrics=metrics))
        self.assertAlmostEqual(line.value, 0.72)
        self.assertEqual(len(line.history), 2)

    def test_a_contribution_that_was_not_counted_does_not_make_the_adapter_larger(self):
        silos = {"a": SiloView(accepted=2, bytes_up=300), "b": SiloView(accepted=3, bytes_up=300), "c": SiloView(bytes_up=100)}
        self.assertEqual(run.adapter_bytes(JobView("j", "succeeded", 3, 3, silos=silos)), 100)

    def test_headlines_in_words(self):
        self.assertEqual(run.headline(JobView("j", "queued", 0, 3)), "waiting for the first round")
        self.assertEqual(run.headline(JobView("j", "running", 2, 3)), "round 2 of 3")
        self.assertEqual(run.headline(JobView("j", "failed", 2, 3, "too few silos")), "the job failed: too few silos")


class CliTest(unittest.TestCase):
    def test_toml_text_is_escaped(self):
        self.assertEqual(cli.toml_value('a "b"\n\\\x7f'), '"a \\"b\\"\\n\\\\\\u007f"')
        self.assertEqual(cli.toml_value([True, 1, 0.5, "x"]), '[true, 1, 0.5, "x"]')
        self.assertEqual(cli.toml([("", {"a": 1, "b": None}), ("[[t]]", {"c": "d"})]), 'a = 1\n\n[[t]]\nc = "d"\n')

    def test_a_pair_task_names_both_columns_and_a_single_one_does_not(self):
        commands = cli.Commands(Path("/p"), Path("/w"), 1, 2)
        pair = commands.client_config(SILOS[1], Path("/t"), Path("/b"))
        self.assertIn('columns.text_b = "text_b"', pair)
        single = commands.client_config(SILOS[0], Path("/t"), Path("/b"))
        self.assertIn('columns.text = "text"', single)
        self.assertNotIn("text_b", single)

    def test_what_does_not_fit_into_a_silos_memory_goes_to_disk(self):
        config = cli.Commands(Path("/p"), Path("/w"), 1, 2).client_config(SILOS[0], Path("/t"), Path("/b"))
        self.assertIn('[cache]\nfolder = "/w"\n', config)

    def test_local_has_one_adapter_with_as_many_parameters(self):
        spec = cli.Commands(Path("/p"), Path("/w"), 1, 2).job_spec(SILOS, Settings(bottleneck=16), local=True)
        self.assertIn("bottleneck = 32", spec)
        self.assertIn('name = "local"', spec)
        # Each process has a part of the silos only, and would wait for one that is named but not there.
        self.assertIn("silos = []\n", spec)
        self.assertIn("min_silos = 1\n", spec)

    def test_a_daemons_status_is_read(self):
        work = {"job": "j", "round": 2, "rounds": 5, "doing": "training", "step": 3, "steps": 32}
        self.assertEqual(cli.parse_status(json.dumps({"work": work})), cli.Doing("training", 2, 3, 32))
        self.assertIsNone(cli.parse_status('{"work": null}'))

    def test_the_rounds_of_a_simulation_are_read_from_its_log(self):
        line = "2025-01-31T12:00:00Z  INFO concord_client: round done silo.id={} round={} rounds=6\n"
        log = line.format("a", 1) + "other\n" + line.format("b-2", 1) + line.format("a", 2)
        self.assertEqual(cli.rounds_simulated(log), {"a": 2, "b-2": 1})

    def test_a_simulation_that_failed_is_no_result(self):
        with self.assertRaisesRegex(ValueError, "failed: too few"):
            cli.parse_simulated('{"state": "failed", "reason": "too few", "metrics": []}')

    def test_states_and_metrics_are_read_in_either_spelling(self):
        reports = [{"silo_id": "a", "round": 1, "point": "METRIC_POINT_LAST_TEST", "metrics": [{"name": "accuracy", "value": 0.5}]}]
        text = json.dumps({"job": {"job_id": "j", "state": "JOB_STATE_SUCCEEDED", "rounds": 1}, "metrics": reports})
        job = cli.parse_job(text)
        self.assertTrue(job.ended)
        self.assertEqual(cli.metric_of(job.silos["a"], 1, "last_test", "accuracy"), 0.5)
        self.assertIsNone(cli.metric_of(job.silos["a"], 2, "last_test", "accuracy"))
        self.assertIsNone(cli.metric_of(None, 1, "last_test", "accuracy"))


if __name__ == "__main__":
    unittest.main()
