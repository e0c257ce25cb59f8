"""Processes that compare answers, each of which can be killed at any moment.

Own code, since the pools at hand do not fit. ``concurrent.futures`` cannot end a task. Pebble can, but it starts its
processes with the caller's main module: a script without a ``__main__`` guard is run a second time, and its pool is
broken for good once a process dies between tasks. Here a worker is a program of its own (``worker.py``), which is
spoken to by lines.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from stepalign.errors import GraderError

_PROGRAM = Path(__file__).with_name("worker.py")
START_SECONDS = 120.0
"""A worker imports sympy, which takes a second, and more on a busy machine."""
WALL_SECONDS = 30.0
"""The last resort. A question is bounded by its CPU time, which this leaves to a machine under load."""


class _Worker:
    """One process. Not for two threads at once."""

    def __init__(self) -> None:
        # -P: the program's folder holds a module `math`, which must not stand for Python's own. A session of its own:
        # an interrupt from the keyboard is for the caller, and the whole of it can be killed.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        self._asked, self._read = 0, b""
        said = self._line(START_SECONDS)
        if said != b'"ready"':
            self.kill()
            raise GraderError(
                "the process that compares answers does not start; its last words are on stderr, and without memory "
                "or processes for it set the grader to 'exact'"
            )

    def ask(self, answer: str, known: str) -> bool | None:
        """Whether the two are equal; None where the process cannot tell. Raises OSError when the process is gone."""
        stdin = self.process.stdin
        assert stdin is not None
        self._asked += 1
        stdin.write(json.dumps([self._asked, answer, known]).encode() + b"\n")
        stdin.flush()
        while True:
            line = self._line(WALL_SECONDS)
            if line is None:
                raise OSError("the process that compares answers gave none")
            number, said = json.loads(line)
            # Of a child that has died it is not known which question it read; a late answer has another number.
            if number in (self._asked, None):
                return said

    def _line(self, seconds: float) -> bytes | None:
        """The next line; None at the end of the time or of the process."""
        assert self.process.stdout is not None
        output, until = self.process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()
        poll.register(output, select.POLLIN)
        while b"\n" not in self._read:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000) or not (read := os.read(output, 64)):
                return None
            self._read += read
        line, _, self._read = self._read.partition(b"\n")
        return line

    def kill(self) -> None:
        """End it with its child, whatever they do."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Close this process' ends of the pipes."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            # What a dead process has not read is still to be flushed.
            with suppress(OSError):
                pipe.close()


class WorkerLostError(Exception):
    """A worker was killed, or the machine was too busy for its answer. It may go well the next time."""


class Pool:
    """At most ``size`` workers, started when they are needed and killed at the end of the process."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._reset()
        atexit.register(self.close)
        # A fork must not share its parent's workers: two would read each other's answers.
        os.register_at_fork(after_in_child=self._forget)

    def _reset(self) -> None:
        self._free = threading.BoundedSemaphore(self._size)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: set[_Worker] = set()

    def _forget(self) -> None:
        for worker in self._all:
            worker.forget()
        self._reset()

    def ask(self, answer: str, known: str) -> bool | None:
        """Whether the two are equal; None where that cannot be told in a worker's limits.

        Raises GraderError where no worker starts, and WorkerLostError where one was killed or gave no answer in time.
        """
        with self._free:
            worker = self._waiting() or _Worker()
            self._all.add(worker)
            try:
                said = worker.ask(answer, known)
            except BaseException as error:
                self._all.discard(worker)
                worker.kill()
                if isinstance(error, OSError):
                    raise WorkerLostError from error
                raise
            self._idle.put(worker)
            return said

    def _waiting(self) -> _Worker | None:
        """A worker that waits for a question. Those that somebody has killed meanwhile are passed over."""
        while not self._idle.empty():
            with suppress(queue.Empty):
                worker = self._idle.get_nowait()
                if worker.process.poll() is None:
                    return worker
                self._all.discard(worker)
                worker.forget()
        return None

    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [worker.process.pid for worker in self._all]

    def close(self) -> None:
        """Kill all workers. The next question starts others."""
        workers, self._all = self._all, set()
        self._idle = queue.SimpleQueue()
        for worker in workers:
            worker.kill()
