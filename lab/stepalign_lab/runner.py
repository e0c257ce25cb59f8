"""``stepalign run``: Redis, critic, solver, trainer and evaluation as processes on this machine."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepalign.config import load_config
from stepalign.errors import ConfigError, ProcessFailedError
from stepalign.problems import load_problems
from stepalign.prompts import load_prompt
from stepalign.queue import QueueStatus, forget_run, open_queue, redis_url
from stepalign.types import ContextKind
from stepalign_lab.report import build_report, write_report
from stepalign_lab.supervisor import Child, Supervisor

START_TIMEOUT_SECONDS = 180.0
POLL_SECONDS = 0.1
Watch = Callable[[], None]


class LocalRun:
    """One run on this machine. ``overrides`` are the dotted command-line overrides, handed on to every process."""

    def __init__(self, config_path: Path, overrides: Sequence[str]) -> None:
        self.config_path = config_path
        self.overrides = list(overrides)
        self.config = load_config(config_path, overrides)
        self.environment: dict[str, str] = {}
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 2) // 2))

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Check what can be checked before a process starts, and make the run's folder."""
        config = self.config
        for path in (config.data.train, config.data.validation, config.data.test):
            if path is not None:
                load_problems(path)
        for prompts, name in ((config.model.prompts, "student"), (config.critic.prompts, "critique")):
            load_prompt(prompts, name)
        self._require_model("model.path", config.model.path)
        if config.critic.url is None and config.critic.backend == "transformers" and config.critic.path is not None:
            self._require_model("critic.path", config.critic.path)
        self._lock_folder()
        used = config.run_dir.exists() and any(config.run_dir.iterdir())
        url = redis_url(config.queue)
        queued = url is not None and asyncio.run(self._queue_status(url)).published > 0
        if resume and not used:
            raise ConfigError(f"{config.run_dir}: there is nothing to resume")
        if (used or queued) and not (resume or overwrite):
            where = config.run_dir if used else "the Redis server"
            raise ConfigError(
                f"{where} holds an earlier run named {config.run.name!r}: continue it with --resume, replace it with "
                "--overwrite, or choose another --run.name"
            )
        if not resume:
            if queued:
                asyncio.run(forget_run(config.queue, config.run.name))
            shutil.rmtree(config.run_dir, ignore_errors=True)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("critic.url", "redis/redis.url"):
            (config.run_dir / name).unlink(missing_ok=True)

    def _lock_folder(self) -> None:
        """Held until this process ends; a second run of the same name must not touch the folder meanwhile."""
        self.config.run.dir.mkdir(parents=True, exist_ok=True)
        self._lock = (self.config.run.dir / f".{self.config.run.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.config.run_dir} is in use by another `stepalign run`") from None

    @staticmethod
    def _require_model(key: str, path: Path) -> None:
        if not (path / "config.json").is_file():
            hint = ": make smollm2 puts SmolLM2 there" if path.name == "smollm2" else ""
            raise ConfigError(f"{key}: there is no model in {path}{hint}")

    def run(self, watch: Watch) -> dict[str, Any]:
        """Run to the end and write the report. ``watch`` is called several times a second.

        Raises KeyboardInterrupt on SIGINT and SIGTERM alike, and ProcessFailedError; no process is left in any case.
        """
        started = time.monotonic()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with Supervisor(self.config.run_dir / "logs") as supervisor:
            self._start_redis(supervisor)
            self._start_critic(supervisor)
            workers = self._start_workers(supervisor)
            while any(child.process.poll() is None for child in workers):
                supervisor.check()
                watch()
                time.sleep(POLL_SECONDS)
            supervisor.check()
            watch()
            status = asyncio.run(self._queue_status(self.environment["STEPALIGN_QUEUE__REDIS_URL"]))
        report = build_report(self.config, status, time.monotonic() - started, self.threads)
        write_report(self.config, report)
        return report

    def _command(self, supervisor: Supervisor, name: str, *options: str, ends: bool = True) -> Child:
        environment = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false", **self.environment}
        arguments = [name, str(self.config_path), *options, *self.overrides]
        return supervisor.start(name, "stepalign.supervised", arguments, environment, ends=ends)

    def _start_redis(self, supervisor: Supervisor) -> None:
        url = redis_url(self.config.queue)
        if url is None:
            directory = self.config.run_dir / "redis"
            supervisor.start("redis", "stepalign.embedded_redis", [str(directory)], {}, ends=False)
            url = self._await_file(supervisor, directory / "redis.url")
        # In the environment, not on a command line, where every user of the machine could read the password.
        self.environment["STEPALIGN_QUEUE__REDIS_URL"] = url

    def _start_critic(self, supervisor: Supervisor) -> None:
        if self.config.critic.url is not None or self.config.context_kind is not ContextKind.CRITIQUE:
            return
        self._command(supervisor, "critic", ends=False)
        self.environment["STEPALIGN_CRITIC__URL"] = self._await_file(supervisor, self.config.run_dir / "critic.url")

    def _start_workers(self, supervisor: Supervisor) -> list[Child]:
        workers = [self._command(supervisor, "trainer"), self._command(supervisor, "solver")]
        if self.config.data.validation is not None and self.config.data.test is not None:
            workers.append(self._command(supervisor, "evaluate", "--follow"))
        return workers

    def _await_file(self, supervisor: Supervisor, path: Path) -> str:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not path.exists():
            supervisor.check()
            if time.monotonic() > deadline:
                raise ProcessFailedError(f"{path} did not appear within {START_TIMEOUT_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        return path.read_text(encoding="utf-8").strip()

    async def _queue_status(self, url: str) -> QueueStatus:
        settings = self.config.queue.model_copy(update={"redis_url": url})
        queue = open_queue(settings, self.config.run.name, consumer="run")
        try:
            return await queue.status()
        finally:
            await queue.close()
