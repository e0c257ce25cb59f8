"""Runs of a few rollouts through the real commands, and their visible effects.

:class:`Bench` runs the solver and the trainer as threads of this process, on a real Redis server and a critic behind
HTTP; the evaluation; the critic's server; and the queue. The effects of one configuration are computed once.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import load_file, save_file
from starlette.types import ASGIApp, Receive, Scope, Send
from typer.testing import CliRunner

from stepalign import plugins
from stepalign.commands.application import build_app
from stepalign_critic import process as critic_process
from stepalign_critic.app import create_app
from stepalign_critic.backends import create_backend
from stepalign_critic.backends import transformers as critic_models
from stepalign_critic.service import CriticService
from stepalign_launcher.commands.demo import lab_configuration
from stepalign_models.sampling import Completion, Sampler
from stepalign_report.build import build_report
from stepalign_run.config import Config, CriticServerSection, load_config, load_critic_config
from stepalign_run.policy_store import Canary, PolicyVersion, file_sha256, open_policy_store
from stepalign_run.queue import RedisRolloutQueue, forget_run
from stepalign_run.rollout import Rollout
from stepalign_run.testing import MemoryBroker
from stepalign_solver import commands as solver_commands
from stepalign_solver.evaluation import Evaluator
from stepalign_trainer import commands as trainer_commands
from stepalign_trainer.batch import item as trainer_items
from stepalign_trainer.batch.examples import Example, build_example
from stepalign_trainer.update.learner import Learner

ASSETS = lab_configuration().parent
LOUD = "{{ '<bos>' }}{% if loud %}question {% endif %}"
"""A chat template with an option."""

CANARY = Canary(prompt_token_ids=[1], completion_token_ids=[2], logprobs=[-1.0])
CONFIG = """
[run]
name = "observed"
dir = "{folder}/runs"

[model]
path = "solver"
prompts = "lab-v1"
device = "cpu"

[data]
train = "train.jsonl"
validation = "validation.jsonl"
test = "test.jsonl"

[queue]
redis_url = "{redis_url}"
capacity = 16

[critic]
url = "{critic_url}"
backend = "program"
checker = "lab"
path = "critic"
prompts = "lab-v1"
device = "cpu"
port = 0
max_prompt_tokens = 256
max_new_tokens = 96

[solver]
max_prompt_tokens = 64
max_new_tokens = 64

[trainer]
steps = 1
batch = 4
learning_rate = 1e-3
max_teacher_prompt_tokens = 192
token_view = 1

[trainer.lora]
rank = 4
alpha = 8

[evaluation]
samples = 2
every = 1
max_new_tokens = 64
"""


def is_odd(answer: str, known_answer: str) -> bool:
    """A grader that finds about half of the base's answers right, known or not."""
    return answer.isdecimal() and int(answer) % 2 == 1


def _entry_points(*, group: str) -> EntryPoints:
    """Those that are installed, and a grader of this module."""
    found = entry_points(group=group)
    if group != plugins.GRADERS:
        return found
    exact = found["exact"]
    odd = EntryPoint("odd", f"{__name__}:is_odd", group)
    vars(odd).update(dist=exact.dist)
    return EntryPoints([*found, odd])


@dataclass
class Trained:
    """The visible effects of a run of solver and trainer."""

    published: list[list[Rollout]] = field(default_factory=list[list[Rollout]])
    """Groups, as they were published."""
    samplings: list[int] = field(default_factory=list[int])
    """Completions of each call of the sampler."""
    sampled_by: list[str] = field(default_factory=list[str])
    """Class of the model of each call."""
    examples: list[Example] = field(default_factory=list[Example])
    forwards: list[int] = field(default_factory=list[int])
    """Rollouts of each forward pass."""
    head_tokens: list[int] = field(default_factory=list[int])
    """Tokens of each call of the output head."""
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The metrics, without timings."""
    tokens: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    files: list[str] = field(default_factory=list[str])
    """Relative to the bench's folder."""
    adapters: list[str] = field(default_factory=list[str])
    """Checksums."""
    shapes: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Of the last adapter's weights."""
    heartbeat: bool = False
    critic_keys: list[str | None] = field(default_factory=list[str | None])
    """The ``Authorization`` header of each request for a critique."""

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]


@dataclass
class Evaluated:
    completions: list[Completion] = field(default_factory=list[Completion])
    samplings: list[int] = field(default_factory=list[int])
    sampled_by: list[str] = field(default_factory=list[str])
    steps: list[int] = field(default_factory=list[int])
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    """By split, those of the base."""
    chance: dict[str, float] | None = None
    heartbeat: bool = False


class Recorder:
    """The critic's app, watched: keys of the requests, most of them at once; each is held for ``hold`` seconds."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.hold = 0.0
        self.keys: list[str | None] = []
        self.now, self.most = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/critiques":
            await self.app(scope, receive, send)
            return
        key = dict(scope["headers"]).get(b"authorization")
        self.keys.append(None if key is None else key.decode())
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.hold)
        try:
            await self.app(scope, receive, send)
        finally:
            self.now -= 1

    def reset(self, hold: float = 0.0) -> None:
        self.hold, self.most, self.keys = hold, 0, []


@contextmanager
def exact_critic() -> Iterator[tuple[str, Recorder]]:
    """The lab's exact critic behind HTTP."""
    section = CriticServerSection(backend="program", checker="lab", prompts="lab-v1")
    recorder = Recorder(create_app(CriticService(create_backend(section), section.prompts)))
    server = uvicorn.Server(uvicorn.Config(recorder, log_config=None, access_log=False, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", recorder
        server.should_exit = True
        thread.join(10)


def _copy_model(name: str, target: Path) -> None:
    shutil.copytree(ASSETS / name, target)
    template = target / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ '<bos>' }}", LOUD))


def _copy_problems(name: str, target: Path, start: int, count: int) -> None:
    rows = (ASSETS / "problems" / f"{name}.jsonl").read_text().splitlines(keepends=True)
    target.write_text("".join(rows[start : start + count]))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Bench:
    """A folder with small models and problem lists, a Redis server, one for a cache, and a critic."""

    def __init__(self, folder: Path, redis_url: str, cache_url: str, critic_url: str, recorder: Recorder) -> None:
        self.folder = folder
        self.recorder = recorder
        self.redis_url = redis_url
        self.cache_url = cache_url
        self.critic_url = critic_url
        self.file = folder / "run.toml"
        self.file.write_text(CONFIG.format(folder=folder, redis_url=redis_url, critic_url=critic_url))
        for name in ("solver", "critic"):
            _copy_model(name, folder / name)
        self._write_other_solver()
        _copy_problems("train", folder / "train.jsonl", 0, 12)
        _copy_problems("train", folder / "other.jsonl", 20, 12)
        for name in ("validation", "test"):
            _copy_problems(name, folder / f"{name}.jsonl", 0, 2)
        self._trained: dict[tuple[str, ...], Trained] = {}
        self._evaluated: dict[tuple[str, ...], Evaluated] = {}

    def _write_other_solver(self) -> None:
        weights = shutil.copytree(self.folder / "solver", self.folder / "other_solver") / "model.safetensors"
        changed = load_file(weights)
        changed["model.norm.weight"] *= 0.5
        save_file(changed, weights, metadata={"format": "pt"})

    def config(self, overrides: Sequence[str] = ()) -> Config:
        return load_config(self.file, overrides, environ={})

    def trained(self, overrides: Sequence[str] = ()) -> Trained:
        key = tuple(overrides)
        if key not in self._trained:
            self._trained[key] = self.train(key)
        return self._trained[key]

    def evaluated(self, overrides: Sequence[str] = ()) -> Evaluated:
        key = tuple(overrides)
        if key not in self._evaluated:
            self._evaluated[key] = self.evaluate(key)
        return self._evaluated[key]

    def train(self, overrides: Sequence[str] = (), critic_holds: float = 0.0) -> Trained:
        """Run the commands ``solver`` and ``trainer`` anew."""
        config = self.config(overrides)
        seen = Trained()
        self.recorder.reset(critic_holds)
        beat = self.folder / "beat"
        beat.unlink(missing_ok=True)
        shutil.rmtree(config.run_dir, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            _watch(patch, seen)
            self._run_threads(config, overrides)
        asyncio.run(forget_run(config.queue, config.run.name))
        timings = {"update_seconds", "tokens_per_second"}
        rows = _read_rows(config.run_dir / "metrics.jsonl")
        seen.rows = [{key: value for key, value in row.items() if key not in timings} for row in rows]
        seen.tokens = _read_rows(config.run_dir / "tokens.jsonl")
        files = [path for path in config.run_dir.rglob("*") if path.is_file()]
        seen.files = sorted(str(path.relative_to(self.folder)) for path in files)
        adapters = sorted((config.run_dir / "adapters").rglob("*.safetensors"))
        seen.adapters = [file_sha256(path) for path in adapters]
        seen.shapes = {name: list(value.shape) for name, value in load_file(adapters[-1]).items()}
        seen.heartbeat = beat.exists()
        seen.critic_keys = self.recorder.keys
        if not overrides:
            shutil.copytree(adapters[-1].parent, self.folder / "adapter", dirs_exist_ok=True)
        shutil.rmtree(config.run_dir)
        return seen

    def reported(self, *overrides: str) -> Path:
        """The folder of a whole run: solver and trainer, then the evaluation and the report, as their commands do."""
        config = self.config(overrides)
        self._run_threads(config, overrides)
        Evaluator(config).run()
        done = CliRunner().invoke(build_app(), ["report", str(self.file), *overrides], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        asyncio.run(forget_run(config.queue, config.run.name))
        return config.run_dir

    def _run_threads(self, config: Config, overrides: Sequence[str]) -> None:
        """The commands, side by side. Raises the first error of either; then the other one is told to end."""
        failures: list[BaseException] = []

        async def end() -> None:
            policies = open_policy_store(config.queue, config.run.name)
            await policies.announce_sampled(config.trainer.steps)
            await policies.publish(PolicyVersion(version=10**6, path="/nowhere", sha256="0" * 64, canary=CANARY))
            await policies.finish()
            await policies.close()

        def run(command: Callable[..., None]) -> None:
            try:
                command(SimpleNamespace(args=[*overrides]), self.file)
            except BaseException as error:
                failures.append(error)
                asyncio.run(end())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plugins, "entry_points", _entry_points)
            for module in (trainer_commands, solver_commands):
                patch.setattr(module, "configure_logging", lambda process: None)
            commands = (trainer_commands.trainer, solver_commands.solver)
            threads = [threading.Thread(target=run, args=(command,), daemon=True) for command in commands]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
        if failures:
            asyncio.run(forget_run(config.queue, config.run.name))
            raise failures[0]
        assert not any(thread.is_alive() for thread in threads)

    def evaluate(self, overrides: Sequence[str] = ()) -> Evaluated:
        """Evaluate the adapters of an unchanged run anew."""
        config = self.config(overrides)
        self.trained()
        beat = self.folder / "beat"
        beat.unlink(missing_ok=True)
        shutil.rmtree(config.run_dir, ignore_errors=True)
        for step in range(1, config.trainer.steps + 1):
            shutil.copytree(self.folder / "adapter", config.run_dir / "adapters" / f"v{step:06d}")
        seen = Evaluated()
        sample = Sampler.sample

        def watched(self: Sampler, prompts: Any, parameters: Any) -> list[Completion]:
            completions = sample(self, prompts, parameters)
            seen.samplings.append(len(completions))
            seen.sampled_by.append(type(self.model).__name__)
            seen.completions += completions
            return completions

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plugins, "entry_points", _entry_points)
            patch.setattr(Sampler, "sample", watched)
            summary = Evaluator(config).run()
        seen.steps = [int(step) for step in summary["validation"]]
        seen.figures = {
            "validation": (summary["problem_ids"]["validation"], summary["validation"]["0"]),
            "test": (summary["problem_ids"]["test"], summary["base_test"]),
        }
        seen.chance = build_report(config, MemoryBroker().status(), wall_seconds=1.0, threads=1).chance
        seen.heartbeat = beat.exists()
        shutil.rmtree(config.run_dir)
        return seen

    def served(self, overrides: Sequence[str], act: Callable[[Served], Any]) -> Any:
        """Serve the critic as its command does, in this thread, while ``act`` uses it from another one.

        Returns the value of ``act``.
        """
        section = load_critic_config(self.file, overrides, environ={}).critic
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        answers: list[Any] = []
        failures: list[BaseException] = []
        users: list[threading.Thread] = []
        seen = Served()

        class Watched(critic_process._Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                assert sockets is not None
                seen.server, seen.port = self, sockets[0].getsockname()[1]
                seen.url = f"http://127.0.0.1:{seen.port}"
                users.append(threading.Thread(target=use, daemon=True))
                users[0].start()

            def _end_at_once(self) -> None:
                """This process is not the critic's own."""

        def use() -> None:
            try:
                seen.await_ready()
                answers.append(act(seen))
            except BaseException as error:
                failures.append(error)
            finally:
                assert seen.server is not None
                seen.server.should_exit = True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(critic_process, "_Server", Watched)
            seen.watch_models(patch)
            try:
                with suppress(SystemExit):  # the end of a handled SIGTERM
                    critic_process.serve(section)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        # The server may have ended before its user.
        for user in users:
            user.join(30)
        if failures:
            raise failures[0]
        return answers[0]


@dataclass
class Served:
    """A critic that serves, and the requests to its model."""

    server: Any = None
    url: str = ""
    port: int = 0
    batches: list[int] = field(default_factory=list[int])
    """Sizes of the batches that were generated."""
    dtype: torch.dtype | None = None

    def await_ready(self) -> None:
        deadline = time.monotonic() + 30
        while httpx.get(f"{self.url}/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            assert not self.server.should_exit, "the backend did not start"
            time.sleep(0.01)

    def watch_models(self, patch: pytest.MonkeyPatch) -> None:
        load, answer = critic_models._load, critic_models.TransformersBackend._answer

        def watched_load(path: Path, section: Any) -> Any:
            loaded = load(path, section)
            self.dtype = loaded.model.dtype
            return loaded

        def watched_answer(backend: Any, asked: list[Any], wanted: Any) -> list[Any]:
            self.batches.append(len(asked))
            return answer(backend, asked, wanted)

        patch.setattr(critic_models, "_load", watched_load)
        patch.setattr(critic_models.TransformersBackend, "_answer", watched_answer)


def _watch(patch: pytest.MonkeyPatch, seen: Trained) -> None:
    """Note the calls of the processes' own functions, and change nothing."""
    publish, sample, hidden_states = RedisRolloutQueue.publish, Sampler.sample, Learner.hidden_states
    make_learner = Learner.__init__

    async def watched_publish(self: RedisRolloutQueue, group: Sequence[Rollout]) -> Any:
        seen.published.append(list(group))
        return await publish(self, group)

    def watched_sample(self: Sampler, prompts: Any, parameters: Any) -> list[Completion]:
        seen.samplings.append(len(prompts))
        seen.sampled_by.append(type(self.model).__name__)
        return sample(self, prompts, parameters)

    def watched_example(*arguments: Any) -> Example:
        example = build_example(*arguments)
        seen.examples.append(example)
        return example

    def watched_hidden_states(self: Learner, prompts: Any, completions: Any) -> list[torch.Tensor]:
        seen.forwards.append(len(prompts))
        return hidden_states(self, prompts, completions)

    def watched_learner(self: Learner, *arguments: Any) -> None:
        make_learner(self, *arguments)
        head = cast(torch.nn.Module, self._head)
        head.register_forward_hook(lambda module, inputs, output: seen.head_tokens.append(len(inputs[0])))

    patch.setattr(RedisRolloutQueue, "publish", watched_publish)
    patch.setattr(Sampler, "sample", watched_sample)
    patch.setattr(trainer_items, "build_example", watched_example)
    patch.setattr(Learner, "hidden_states", watched_hidden_states)
    patch.setattr(Learner, "__init__", watched_learner)
