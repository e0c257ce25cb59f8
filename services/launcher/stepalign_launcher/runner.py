"""The base of ``stepalign run`` and ``stepalign probe``: Redis, critic and workers as processes on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from stepalign.errors import ConfigError
from stepalign.plugins import load_checker, load_grader
from stepalign.problems import load_problems
from stepalign.prompts import load_prompt
from stepalign_launcher.supervisor import POLL_SECONDS, Child, Supervisor
from stepalign_run.config import load_config
from stepalign_run.fingerprint import require_same_run
from stepalign_run.folder.files import lock_file
from stepalign_run.folder.layout import RunFolder
from stepalign_run.logging import configure_console_logging
from stepalign_run.queue import QueueStatus, forget_run, open_queue, redis_url
from stepalign_run.training_problems import load_training_problems

START_TIMEOUT_SECONDS = 180.0


def lock_folder(folder: Path) -> IO[str]:
    """A lock that is held until the file or this process ends: another command must not touch the folder meanwhile.

    Raises ConfigError when another one holds it.
    """
    return lock_file(RunFolder(folder).lock, f"{folder} is in use by another `stepalign` command")


class LocalProcesses(ABC):
    """Redis, critic and workers on this machine. ``overrides`` are dotted, and are handed on to every process."""

    def __init__(self, config_path: Path, overrides: Sequence[str]) -> None:
        self.config_path = config_path
        self.overrides = list(overrides)
        self.config = load_config(config_path, overrides)
        self.folder = self.config.folder
        self.own_folder = self.config.own_folder
        self.replaced: Path | None = None
        """Where an earlier run of this name has gone."""
        self.environment: dict[str, str] = {}
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 2) // 2))

    @property
    def needs_critic(self) -> bool:
        """Whether a worker asks a critic."""
        return self.config.arm.needs_critic

    @abstractmethod
    def _start_workers(self, supervisor: Supervisor) -> list[Child]:
        """Start the workers. The work is done when all of the returned ones have ended."""

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Check the configured files and models before any process starts, and make the run's folder.

        Raises NotOursError where the folder is somebody else's, which neither option changes.
        """
        config = self.config
        self.own_folder.require()
        load_training_problems(config)
        for path in (config.data.validation, config.data.test):
            if path is not None:
                load_problems(path)
        for prompts, name in ((config.model.prompts, "student"), (config.critic.prompts, "critique")):
            load_prompt(prompts, name)
        load_grader(config.data.grader)
        if self.needs_critic and config.critic.url is None:
            load_grader(config.critic.grader, "critic.grader")
        if config.data.checker is not None:
            load_checker(config.data.checker)
        self._require_model("model.path", config.model.path)
        if config.critic.url is None and config.critic.backend == "transformers" and config.critic.path is not None:
            self._require_model("critic.path", config.critic.path)
        self._lock = lock_folder(config.run_dir)
        used = not self.folder.is_empty
        url = redis_url(config.queue)
        queued = url is not None and asyncio.run(self._queue_status(url)).published > 0
        if resume and not used:
            raise ConfigError(f"{config.run_dir}: there is nothing to resume")
        if resume:
            require_same_run(config)
        if (used or queued) and not (resume or overwrite):
            where = config.run_dir if used else "the Redis server"
            raise ConfigError(
                f"{where} holds an earlier run named {config.run.name!r}: continue it with --resume, replace it with "
                "--overwrite, or choose another --run.name"
            )
        if not resume:
            self.replaced = self.own_folder.move_aside(self._inputs())
            if queued:
                asyncio.run(forget_run(config.queue, config.run.name))
        self.own_folder.claim()
        for address in (self.folder.critic_url, self.folder.redis_url):
            address.unlink(missing_ok=True)
        # The evaluation makes it anew from its rows; with an earlier session's the report would not wait for that.
        self.folder.evaluation.unlink(missing_ok=True)

    def _inputs(self) -> list[Path]:
        """Files and folders that the processes are still to read."""
        config = self.config
        named = (config.model.path, config.data.train, config.data.validation, config.data.test, config.critic.path)
        arm = [Path(config.run.arm)] if config.run.arm.endswith(".toml") else []
        return [self.config_path, *arm, *(path for path in named if path is not None)]

    @staticmethod
    def _require_model(key: str, path: Path) -> None:
        """A file of weights that is cut off would be found by each worker for itself, once each time it is started."""
        from safetensors import SafetensorError, safe_open

        if not (path / "config.json").is_file():
            hint = ": make smollm2 puts SmolLM2 there" if path.name == "smollm2" else ""
            raise ConfigError(f"{key}: there is no model in {path}{hint}")
        for weights in sorted(path.glob("*.safetensors")):
            try:
                with safe_open(weights, framework="numpy"):
                    pass
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{key}: {weights} cannot be read: {error}; copy the model again") from None

    def work(self) -> QueueStatus:
        """Work to the end. Returns the queue's last state.

        A crashed process is started again, with a warning on stderr. Raises KeyboardInterrupt on SIGINT and SIGTERM
        alike, and ProcessFailedError; no process is left in any case.
        """
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        configure_console_logging()
        with Supervisor(self.folder.logs) as supervisor:
            redis = self._start_redis(supervisor)
            self._start_critic(supervisor)
            workers = self._start_workers(supervisor)
            while not all(child.done for child in workers):
                supervisor.check()
                time.sleep(POLL_SECONDS)
            supervisor.check()
            if redis is not None:
                supervisor.await_address(redis, START_TIMEOUT_SECONDS)
            return asyncio.run(self._queue_status(self.environment["STEPALIGN_QUEUE__REDIS_URL"]))

    def _command(
        self,
        supervisor: Supervisor,
        name: str,
        *options: str,
        ends: bool = True,
        address_file: Path | None = None,
        shown: bool = False,
    ) -> Child:
        environment = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false", **self.environment}
        arguments = [name, str(self.config_path), *self.overrides, *options]
        return supervisor.start(
            name, "stepalign_launcher.child", arguments, environment, ends=ends, address_file=address_file, shown=shown
        )

    def _start_redis(self, supervisor: Supervisor) -> Child | None:
        """None when the configuration names a server."""
        url, server = redis_url(self.config.queue), None
        if url is None:
            file, arguments = self.folder.redis_url, [str(self.folder.redis)]
            server = supervisor.start(
                "redis", "stepalign_launcher.redis_server", arguments, {}, ends=False, address_file=file
            )
            url = supervisor.await_address(server, START_TIMEOUT_SECONDS)
        # In the environment, not on a command line, where every user of the machine could read the password.
        self.environment["STEPALIGN_QUEUE__REDIS_URL"] = url
        return server

    def _start_critic(self, supervisor: Supervisor) -> None:
        if self.config.critic.url is not None or not self.needs_critic:
            return
        file = self.folder.critic_url
        critic = self._command(supervisor, "critic", "--critic.address_file", str(file), ends=False, address_file=file)
        url = supervisor.await_address(critic, START_TIMEOUT_SECONDS)
        # Last on its command line, where it outdoes the configuration, which may ask for any free port.
        critic.arguments += ["--critic.port", str(urlsplit(url).port)]
        self.environment["STEPALIGN_CRITIC__URL"] = url

    async def _queue_status(self, url: str) -> QueueStatus:
        settings = self.config.queue.model_copy(update={"redis_url": url})
        queue = open_queue(settings, self.config.run.name, consumer="run")
        try:
            return await queue.status()
        finally:
            await queue.close()


class LocalRun(LocalProcesses):
    """One run on this machine. ``brief``: its report is one line."""

    def __init__(self, config_path: Path, overrides: Sequence[str], *, brief: bool = False) -> None:
        super().__init__(config_path, overrides)
        self.brief = brief

    def run(self) -> QueueStatus:
        """Run to the end, and leave the report. Returns and raises as :meth:`work`."""
        return self.work()

    def _start_workers(self, supervisor: Supervisor) -> list[Child]:
        workers = [self._command(supervisor, "trainer"), self._command(supervisor, "solver")]
        if self.config.data.validation is not None and self.config.data.test is not None:
            workers.append(self._command(supervisor, "evaluate", "--follow"))
        # It shows the progress, and writes the report while the server still knows the queue.
        options = ["--follow", *(["--brief"] if self.brief else [])]
        workers.append(self._command(supervisor, "report", *options, shown=True))
        return workers
