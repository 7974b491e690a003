"""Child processes of the demo: started with a log file each, watched, and stopped to the last one.

Children run in sessions of their own, so Ctrl-C reaches only the demo, which then stops them in order: SIGTERM first,
SIGKILL for those that are still there after a while. If the demo itself is killed, the kernel ends them (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator, Mapping, Optional, Sequence

_PR_SET_PDEATHSIG = 1
_INTERRUPT = {"asked": False, "held": False}
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ProcessError(Exception):
    """A child that could not be started, ended too early or failed; the text quotes the end of its log."""


def interrupt(*_: object) -> None:
    """A signal handler: KeyboardInterrupt, but never in the middle of starting or reaping a child."""
    _INTERRUPT["asked"] = True
    if not _INTERRUPT["held"]:
        raise KeyboardInterrupt


def _raise_if_asked() -> None:
    # An exception out of a signal handler is lost where Python ignores exceptions, so the wish is kept as well.
    if _INTERRUPT["asked"]:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Python forks or reaps here: an interruption now would lose either itself or the child, so it waits for the end."""
    _INTERRUPT["held"] = True
    try:
        yield
    finally:
        _INTERRUPT["held"] = False


def _code(process: "subprocess.Popen[bytes]") -> Optional[int]:
    """The exit code of a child that has ended. An exception in the middle of `poll` or `wait` would leave the child's lock taken for ever."""
    with _uninterrupted():
        return process.poll()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Asks a child to end."""
    with _uninterrupted():
        process.terminate()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends a child at once, if it has not ended."""
    with _uninterrupted():
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nobody listens on right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def peak_rss(pid: int) -> Optional[int]:
    """Largest resident memory of a process so far, in bytes; None if it has ended or this is not Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def maps_library(pid: int, name: str) -> Optional[bool]:
    """Whether a process has a file mapped whose name begins with `name`; None if that cannot be seen."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return any(line.rsplit("/", 1)[-1].startswith(name) for line in maps.splitlines() if "/" in line)


def log_tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, indented."""
    try:
        with open(path, "rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 16384))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return "    (no log)"
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (empty log)"


def _end_with_parent() -> None:
    """In the child: ask the kernel for a SIGTERM when the parent dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Processes:
    """The demo's children by name. Use as a context: leaving it, however, stops them all."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._peaks: dict[str, int] = {}

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_all()

    def log_path(self, name: str) -> Path:
        """Where `name` writes its output."""
        return self._logs / f"{name}.log"

    def start(self, name: str, command: Sequence[str], environment: Optional[Mapping[str, str]] = None) -> int:
        """Starts a child that is meant to run until it is stopped; returns its process id."""
        with open(self.log_path(name), "wb") as log, _uninterrupted():
            try:
                self._running[name] = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(os.environ, **(environment or {})),
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            except OSError as error:
                raise ProcessError(f"cannot start {name}: {command[0]}: {error.strerror}") from error
        _raise_if_asked()
        return self._running[name].pid

    def run(self, name: str, command: Sequence[str], timeout: float = 60) -> str:
        """Runs a command to its end and returns its standard output; what it says on standard error goes to its log."""
        with open(self.log_path(name), "ab") as log, tempfile.TemporaryFile() as said:
            try:
                with _uninterrupted():
                    process = subprocess.Popen(
                        list(command),
                        stdin=subprocess.DEVNULL,
                        stdout=said,
                        stderr=log,
                        start_new_session=True,
                        preexec_fn=_end_with_parent,
                    )
            except OSError as error:
                raise ProcessError(f"cannot start {name}: {command[0]}: {error.strerror}") from error
            try:
                deadline = time.monotonic() + timeout
                while (code := _code(process)) is None:
                    _raise_if_asked()
                    if time.monotonic() > deadline:
                        raise ProcessError(f"{name} did not end within {timeout:.0f} s\n{log_tail(self.log_path(name))}")
                    time.sleep(0.01)
            finally:
                _kill(process)
            said.seek(0)
            output = said.read()
        _raise_if_asked()
        if code != 0:
            raise ProcessError(f"{name} failed with exit code {code}\n{log_tail(self.log_path(name))}")
        return output.decode("utf-8", "replace")

    def finished(self, name: str) -> bool:
        """Whether a started child has done its work; raises ProcessError if it failed."""
        _raise_if_asked()
        process = self._running.get(name)
        code = None if process is None else _code(process)
        if code is None:
            return process is None
        if code != 0:
            raise ProcessError(f"{name} failed with exit code {code}\n{log_tail(self.log_path(name))}")
        del self._running[name]
        return True

    def check(self) -> None:
        """Raises ProcessError if a child has ended, and notes how much memory each has used."""
        _raise_if_asked()
        for name, process in self._running.items():
            self._note_peak(name, process.pid)
            code = _code(process)
            if code is not None:
                how = f"exit code {code}" if code >= 0 else f"signal {-code}"
                raise ProcessError(f"{name} ended on its own ({how}); the end of its log:\n{log_tail(self.log_path(name))}")

    def _note_peak(self, name: str, pid: int) -> None:
        peak = peak_rss(pid)
        if peak is not None:
            self._peaks[name] = max(peak, self._peaks.get(name, 0))

    def pid(self, name: str) -> int:
        """The process id of a child."""
        return self._running[name].pid

    def peak(self, name: str) -> Optional[int]:
        """The largest resident memory of a child that was seen, in bytes."""
        if name in self._running:
            self._note_peak(name, self._running[name].pid)
        return self._peaks.get(name)

    def stop_all(self, patience: float = 20) -> list[str]:
        """Stops every child and returns the names of those that had to be killed. A second Ctrl-C ends the patience."""
        running = {name: process for name, process in self._running.items() if _code(process) is None}
        killed: list[str] = []
        for process in reversed(list(running.values())):
            _end(process)
        deadline = time.monotonic() + patience
        try:
            for process in running.values():
                while _code(process) is None and time.monotonic() < deadline:
                    time.sleep(0.01)
        finally:
            for name, process in running.items():
                if _code(process) is None:
                    killed.append(name)
                    _kill(process)
            self._running.clear()
        return killed
