"""One small run of the lab under a fault: processes that have died are started again until it has ended, then audited.

Four updates of four rollouts each, the lab's solver, its exact checker as critic behind HTTP, a Redis server with an
append-only file, no evaluation. The processes are the shipped commands. This module starts them again, not
``stepalign run``: at once, and even a critic that was told to end, as an orchestrator of replicas would.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.errors import BenchError
from benchmarks.faults.injection import Fault
from benchmarks.faults.processes import Command, RedisServer, command
from stepalign.errors import StepalignError
from stepalign_launcher.commands.audit import examine
from stepalign_run.audit import Audit
from stepalign_run.folder.jsonl import read_rows
from stepalign_run.folder.layout import ADAPTER_FILE, RunFolder
from stepalign_run.policy_store import file_sha256
from stepalign_run.redis.connection import run_key

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "lab" / "stepalign_lab" / "assets"
RUN = "faulty"
STEPS, BATCH = 4, 4
_CONFIG = """\
run = {{ name = "{run}", dir = "{folder}/runs" }}
model = {{ path = "{assets}/solver", prompts = "lab-v1", device = "cpu" }}
data = {{ train = "{assets}/problems/train.jsonl" }}
queue = {{ redis_url = "{redis}", capacity = {capacity}, claim_idle_seconds = 1.0, reconnect_seconds = 20.0 }}
solver = {{ max_prompt_tokens = 64, max_new_tokens = 64 }}

[critic]
url = "http://127.0.0.1:{port}"
port = {port}
backend = "program"
checker = "lab"
prompts = "lab-v1"

[trainer]
steps = {steps}
batch = {batch}
learning_rate = 1e-3
max_teacher_prompt_tokens = 192
token_view = 0
lora = {{ rank = 4, alpha = 8 }}
"""
_WHOLE_RUN_SECONDS = 180.0
_POLL_SECONDS = 0.02
# The exit code of a typed error that a restart cannot mend; the process is not started again.
_REFUSED = 1
WORKERS = ("trainer", "solver")


class UnfinishedError(BenchError):
    """A run did not come to its end. ``audit`` is that of its remains, None when it cannot be made."""

    def __init__(self, reason: str, audit: Audit | None) -> None:
        super().__init__(reason)
        self.audit = audit


@dataclass(frozen=True)
class Outcome:
    """The remains of a run."""

    audit: Audit
    twice: int
    """Rollouts in more than one update."""
    updates: int
    weights: str
    """SHA-256 of the last adapter."""
    restarts: dict[str, int]
    seconds: float


class FaultyRun:
    """The processes of a run in ``folder``, which must be empty, with a queue of ``capacity`` entries."""

    def __init__(self, folder: Path, capacity: int = 2 * BATCH) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.run_dir = folder / "runs" / RUN
        port, redis_port = _free_ports()
        self.critic_url = f"http://127.0.0.1:{port}"
        self.redis = RedisServer(folder / "redis-server", redis_port)
        self.config = folder / "run.toml"
        self.config.write_text(
            _CONFIG.format(
                run=RUN,
                folder=folder,
                assets=ASSETS,
                redis=self.redis.url,
                port=port,
                capacity=capacity,
                steps=STEPS,
                batch=BATCH,
            ),
            encoding="utf-8",
        )
        self.commands: dict[str, Command] = {}

    def start(self, names: Sequence[str] = ("critic", *WORKERS), faults: Mapping[str, Fault] | None = None) -> None:
        """Start the named processes, and Redis before them."""
        for name in names:
            self.commands[name] = command(self.folder, name, [str(self.config)], (faults or {}).get(name))

    @property
    def updates(self) -> int:
        """Rows of metrics so far."""
        path = RunFolder(self.run_dir).metrics
        return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0

    def wait(self, until: Callable[[], bool], what: str, seconds: float = _WHOLE_RUN_SECONDS) -> None:
        """Start dead processes again, until ``until``. Raises BenchError when it takes too long."""
        deadline = time.monotonic() + seconds
        while not until():
            self.revive()
            if time.monotonic() > deadline:
                raise BenchError(f"{what} has not come about:\n{self.last_words()}")
            time.sleep(_POLL_SECONDS)

    def revive(self) -> None:
        """Start dead processes again. Raises BenchError for a worker that has refused to go on."""
        for name, process in self.commands.items():
            code = process.exit_code
            if code is None or (code == 0 and name != "critic"):
                continue
            if code == _REFUSED:
                raise BenchError(f"the {name} refused to go on:\n{process.last_words()}")
            process.start_again()

    @property
    def ended(self) -> bool:
        return all(self.commands[name].exit_code == 0 for name in WORKERS)

    def answers(self) -> bool:
        """Whether the critic is ready."""
        try:
            return httpx.get(f"{self.critic_url}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def published(self) -> int:
        """The queue's own counter."""
        with self.redis.client() as client:
            counted: Any = client.hget(run_key(RUN, "ledger"), "published")
        return int(counted or 0)

    def waiting(self) -> int:
        """Entries in the queue."""
        return len(self.payload_sizes())

    def payload_sizes(self) -> list[int]:
        """Bytes of each entry's payload in the queue."""
        with self.redis.client() as client:
            rows: Any = client.xrange(run_key(RUN, "rollouts"))
        return [len(fields[b"rollout"]) for _, fields in rows]

    def finish(self, began: float) -> Outcome:
        """Wait for the end and audit; :meth:`stop` ends the processes. Raises UnfinishedError when there is no end."""
        try:
            self.wait(lambda: self.ended, "the run's end")
        except BenchError as error:
            raise UnfinishedError(str(error), self._audit_of_a_wreck()) from error
        outcomes = read_rows(RunFolder(self.run_dir).outcomes)
        used = [rollout_id for row in outcomes if row["step"] for rollout_id in row["outcomes"]]
        return Outcome(
            audit=examine(self.run_dir, self.config),
            twice=len(used) - len(set(used)),
            updates=self.updates,
            weights=file_sha256(RunFolder(self.run_dir).adapter(STEPS) / ADAPTER_FILE),
            restarts={name: process.starts - 1 for name, process in self.commands.items()},
            seconds=time.monotonic() - began,
        )

    def _audit_of_a_wreck(self) -> Audit | None:
        for process in self.commands.values():
            process.signal(9)
        try:
            return examine(self.run_dir, self.config)
        except StepalignError:
            return None

    def last_words(self) -> str:
        return "\n".join(f"--- {name}:\n{process.last_words()}" for name, process in self.commands.items())

    def stop(self) -> None:
        for process in self.commands.values():
            process.signal(9)
        self.redis.end()


@contextmanager
def faulty_run(folder: Path, capacity: int = 2 * BATCH) -> Iterator[FaultyRun]:
    """A run with its Redis server started; no process of it lives on."""
    run = FaultyRun(folder, capacity)
    run.redis.start()
    try:
        yield run
    finally:
        run.stop()


def _free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as another:
        return one.getsockname()[1], another.getsockname()[1]
