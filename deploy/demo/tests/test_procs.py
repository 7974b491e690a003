"""Child processes: watched, and stopped to the last one."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import context  # noqa: F401
import procs
from procs import Processes, ProcessError


def python(code):
    return [sys.executable, "-c", code]


SLEEP = python("import time; print('up', flush=True); time.sleep(60)")
STUBBORN = python("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def eventually(reached, within=10):
    deadline = time.monotonic() + within
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class ProcessesTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.logs = Path(temporary.name) / "logs"

    def up(self, processes, name):
        self.assertTrue(eventually(lambda: "up" in processes.log_path(name).read_text()))

    def test_leaving_the_context_stops_every_child(self):
        with Processes(self.logs) as processes:
            pids = [processes.start(name, SLEEP) for name in ("a", "b")]
            self.assertTrue(all(map(alive, pids)))
        self.assertFalse(any(map(alive, pids)))

    def test_children_are_stopped_when_something_fails(self):
        with self.assertRaises(RuntimeError):
            with Processes(self.logs) as processes:
                pid = processes.start("a", SLEEP)
                raise RuntimeError
        self.assertFalse(alive(pid))

    def test_a_child_that_ignores_sigterm_is_killed_and_named(self):
        processes = Processes(self.logs)
        pid = processes.start("stubborn", STUBBORN)
        self.up(processes, "stubborn")
        self.assertEqual(processes.stop_all(patience=0.3), ["stubborn"])
        self.assertFalse(alive(pid))

    def test_a_child_that_ends_on_its_own_is_noticed_with_its_last_words(self):
        with Processes(self.logs) as processes:
            processes.start("short", python("import sys; print('bad key'); sys.exit(3)"))
            with self.assertRaisesRegex(ProcessError, r"short ended on its own \(exit code 3\)[^$]*bad key"):
                eventually(processes.check)

    def test_a_command_gives_its_output_and_keeps_its_complaints_in_the_log(self):
        with Processes(self.logs) as processes:
            text = processes.run("tool", python("import sys; print('out'); print('err', file=sys.stderr)"))
            self.assertEqual(text, "out\n")
            self.assertEqual(processes.log_path("tool").read_text(), "err\n")

    def test_a_failing_command_is_an_error_that_quotes_its_log(self):
        with Processes(self.logs) as processes:
            with self.assertRaisesRegex(ProcessError, r"tool failed with exit code 4\n    no such job"):
                processes.run("tool", python("import sys; print('no such job', file=sys.stderr); sys.exit(4)"))

    def test_a_command_that_hangs_is_killed(self):
        with Processes(self.logs) as processes:
            with self.assertRaisesRegex(ProcessError, "did not end within 0 s"):
                processes.run("tool", SLEEP, timeout=0.2)

    def test_a_missing_program_is_named(self):
        with Processes(self.logs) as processes:
            for start in (processes.start, processes.run):
                with self.assertRaisesRegex(ProcessError, "cannot start it: /no/such/program"):
                    start("it", ["/no/such/program"])

    def test_peak_memory_is_seen_and_remembered_after_the_end(self):
        processes = Processes(self.logs)
        processes.start("big", python("x = b'1' * 80_000_000; print('up', flush=True); import time; time.sleep(60)"))
        self.up(processes, "big")
        self.assertGreater(processes.peak("big"), 80_000_000)
        processes.stop_all()
        self.assertGreater(processes.peak("big"), 80_000_000)

    @unittest.skipUnless(sys.platform == "linux", "the kernel's help is Linux's")
    def test_children_end_when_the_demo_is_killed(self):
        code = (
            f"import sys; sys.path.insert(0, {str(context.DEMO)!r})\n"
            "from pathlib import Path; from procs import Processes; import time\n"
            f"print(Processes(Path({str(self.logs)!r})).start('child', {SLEEP!r}), flush=True); time.sleep(60)\n"
        )
        with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True) as parent:
            child = int(parent.stdout.readline())
            self.assertTrue(alive(child))
            parent.kill()
        self.assertTrue(eventually(lambda: not alive(child) or _is_zombie(child)))


def _is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class MachineTest(unittest.TestCase):
    def test_free_ports_differ_and_can_be_bound(self):
        ports = procs.free_ports(5)
        self.assertEqual(len(set(ports)), 5)
        for port in ports:
            with socket.socket() as one:
                one.bind(("127.0.0.1", port))

    @unittest.skipUnless(sys.platform == "linux", "reads /proc")
    def test_own_process_maps_libc_and_no_nonsense(self):
        self.assertTrue(procs.maps_library(os.getpid(), "libc"))
        self.assertFalse(procs.maps_library(os.getpid(), "libtorch"))

    def test_an_ended_process_has_no_memory_and_no_maps(self):
        process = subprocess.Popen(python("pass"))
        process.wait()
        self.assertIsNone(procs.peak_rss(process.pid))
        self.assertIsNone(procs.maps_library(process.pid, "libc"))


class InterruptTest(unittest.TestCase):
    def setUp(self):
        kept = dict(procs._INTERRUPT)
        self.addCleanup(procs._INTERRUPT.update, kept)

    def test_an_interruption_while_a_child_starts_waits_until_the_child_is_known(self):
        with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
            real = subprocess.Popen

            def interrupted(*arguments, **options):
                child = real(*arguments, **options)
                procs.interrupt()
                return child

            with mock.patch.object(procs.subprocess, "Popen", interrupted), self.assertRaises(KeyboardInterrupt):
                processes.start("sleeper", ["sleep", "60"])
            self.assertIsNotNone(processes.pid("sleeper"))

    def test_an_interruption_while_a_child_is_reaped_waits_until_its_lock_is_free(self):
        # In the middle of it, Python's lock for the child stays taken, and whoever waits for the child then waits for ever.
        def interrupted(method):
            def inner(*arguments):
                procs.interrupt()
                return method(*arguments)

            return inner

        poll, wait = interrupted(subprocess.Popen.poll), interrupted(subprocess.Popen.wait)
        with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
            pid = processes.start("sleeper", ["sleep", "60"])
            with mock.patch.multiple(subprocess.Popen, poll=poll, wait=wait):
                processes.check()
                with self.assertRaises(KeyboardInterrupt):
                    processes.check()
                with self.assertRaises(KeyboardInterrupt):
                    processes.run("tool", ["sleep", "60"])
                self.assertEqual(processes.stop_all(), [])
        self.assertFalse(alive(pid))

    def test_an_interruption_that_python_swallowed_comes_back(self):
        with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
            try:
                procs.interrupt()
            except KeyboardInterrupt:
                pass
            with self.assertRaises(KeyboardInterrupt):
                processes.check()


if __name__ == "__main__":
    unittest.main()
