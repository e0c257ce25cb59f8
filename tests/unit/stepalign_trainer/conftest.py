"""The lab's solver as the model, attempts at two chains, their exact critiques, learners, and whole runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from stepalign.critique.alignment import validate_critique
from stepalign.errors import CriticRequestError
from stepalign.plugins import Checker
from stepalign.prompts.content_tokens import content_token_ids
from stepalign.types import Critique, CritiqueRequest, CritiqueResponse, Problem
from stepalign_lab.checker import exact_critique
from stepalign_run.config import Config, load_config
from stepalign_run.context import Context, ContextKind
from stepalign_run.policy_store import PolicyVersion
from stepalign_run.queue import QueueStatus
from stepalign_run.rollout import Rollout
from stepalign_run.testing import MemoryBroker, MemoryPolicyStore, MemoryRolloutQueue
from stepalign_trainer import loop as loop_module
from stepalign_trainer.batch.contexts import Contexts
from stepalign_trainer.batch.examples import Example, ModelLimits, build_example
from stepalign_trainer.durable.step_journal import StepJournal
from stepalign_trainer.loop import Trainer
from stepalign_trainer.update.learner import Learner
from support.critic_answers import answer_of

# 3 + 4 = 7, 7 * 7 = 9, 9 - 2 = 7, 7 + 1 = 8
QUESTION = "3 + 4 * 7 - 2 + 1"
REFERENCE = "7 is 4 + of 3 ; 9 is 7 * of 7 ; 7 is 2 - of 9 ; 8 is 1 + of 7 ; so 8"
PROBLEM = Problem(id="p0", question=QUESTION, answer="8", reference_solution=REFERENCE)
# 1 + 1 = 2, 2 * 3 = 6, 6 - 2 = 4
OTHER_PROBLEM = Problem(
    id="p1",
    question="1 + 1 * 3 - 2",
    answer="4",
    reference_solution="2 is 1 + of 1 ; 6 is 3 * of 2 ; 4 is 2 - of 6 ; so 4",
)
ATTEMPTS = {
    "right": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> "
        "<step_4> 7 + 1 = 8 </step_4> <answer> 8 </answer>"
    ),
    "wrong_step": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 8 </step_2> <step_3> 8 - 2 = 6 </step_3> "
        "<step_4> 6 + 1 = 7 </step_4> <answer> 7 </answer>"
    ),
    "wrong_answer": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> "
        "<step_4> 7 + 1 = 8 </step_4> <answer> 5 </answer>"
    ),
    "missing_step": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 9 - 2 = 7 </step_2> <step_3> 7 + 1 = 8 </step_3> <answer> 8 </answer>"
    ),
    "missing_last": (
        "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> <answer> 8 </answer>"
    ),
    "unfinished": "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 *",
    "unfinished_wrong": "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 +",
    "early_answer": "<step_1> 3 + 4 = 7 </step_1> <answer> 5 </answer>",
    "other_right": (
        "<step_1> 1 + 1 = 2 </step_1> <step_2> 2 * 3 = 6 </step_2> <step_3> 6 - 2 = 4 </step_3> <answer> 4 </answer>"
    ),
    "other_wrong": (
        "<step_1> 1 + 1 = 2 </step_1> <step_2> 2 * 3 = 5 </step_2> <step_3> 5 - 2 = 3 </step_3> <answer> 3 </answer>"
    ),
}
BATCH = ["right", "wrong_step", "missing_step", "wrong_answer"]


@pytest.fixture(scope="session")
def model_path() -> Path:
    return Path(str(files("stepalign_lab") / "assets" / "solver"))


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture
def make_config(tmp_path: Path, model_path: Path) -> Callable[..., Config]:
    """``make_config("--trainer.steps", "3")``: the lab's regime with batches of four."""
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n', encoding="utf-8")
    file = tmp_path / "config.toml"
    file.write_text(
        f"""
        run = {{ name = "unit", dir = "{tmp_path / "runs"}" }}
        model = {{ path = "{model_path}", prompts = "lab-v1", device = "cpu" }}
        data = {{ train = "train.jsonl" }}
        critic = {{ backend = "program", checker = "lab", prompts = "lab-v1" }}
        queue = {{ capacity = 16 }}
        solver = {{ max_prompt_tokens = 64, max_new_tokens = 64 }}
        trainer.max_teacher_prompt_tokens = 192
        trainer.steps = 2
        trainer.batch = 4
        trainer.learning_rate = 1e-3
        trainer.lora = {{ rank = 4, alpha = 8 }}
        """.replace("\n        ", "\n"),
        encoding="utf-8",
    )
    return cache(lambda *overrides: load_config(file, overrides, environ={}))


@pytest.fixture
def rollout_of(tokenizer: Any, make_rollout: Callable[..., Rollout]) -> Callable[..., Rollout]:
    """An attempt, by its name or its text, as a rollout; ``length`` cuts it off instead of ending it by EOS.

    Names that begin with ``other`` are attempts at the other problem."""

    def make(attempt: str, finish: str = "stop", **overrides: Any) -> Rollout:
        text = ATTEMPTS.get(attempt, attempt)
        ids = content_token_ids(tokenizer, text)
        problem = OTHER_PROBLEM if attempt.startswith("other") else PROBLEM
        question = f"<bos><user>question : {problem.question}<assistant>"
        prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
        fields: dict[str, Any] = {
            "problem": problem,
            "prompt_token_ids": prompt,
            "completion_token_ids": [*ids, tokenizer.eos_token_id] if finish == "stop" else ids,
            "text": text,
            "finish_reason": finish,
            "behaviour_logprobs": None,
        }
        return make_rollout(**(fields | overrides))

    return make


@pytest.fixture(scope="session")
def critique_of() -> Callable[[Rollout], Critique]:
    """The exact critique, validated."""

    def make(rollout: Rollout) -> Critique:
        text = exact_critique(rollout.problem.question, rollout.text)
        critique = validate_critique(text, rollout.text, known_answer=rollout.problem.answer)
        assert isinstance(critique, Critique), critique
        return critique

    return make


@pytest.fixture
def example_of(
    make_config: Callable[..., Config],
    tokenizer: Any,
    rollout_of: Callable[..., Rollout],
    critique_of: Callable[[Rollout], Critique],
) -> Callable[..., Example]:
    """An attempt with its critique as the teacher's context."""

    def make(attempt: str, finish: str = "stop", arm: str = "stepalign_scoped") -> Example:
        rollout = rollout_of(attempt, finish)
        critique = critique_of(rollout)
        context = Context(kind=ContextKind.CRITIQUE, text=critique.text)
        return build_example(
            make_config("--run.arm", arm), tokenizer, ModelLimits(52, None), rollout, context, critique
        )

    return make


@pytest.fixture
def examples(example_of: Callable[..., Example]) -> list[Example]:
    """Five examples of different lengths and scopes."""
    names = ["wrong_step", "right", "missing_step", "wrong_answer"]
    return [*map(example_of, names), example_of("unfinished", "length")]


@pytest.fixture
def make_learner(make_config: Callable[..., Config], tokenizer: Any) -> Callable[..., Learner]:
    """A fresh learner; ``stirred=True`` gives its adapter random weights, as after many updates."""

    def make(*overrides: str, stirred: bool = False) -> Learner:
        learner = Learner(make_config(*overrides), tokenizer)
        if stirred:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in learner.parameters:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
        return learner

    return make


class ExactCritic:
    """The exact critic; it refuses attempts that hold ``refuse``."""

    def __init__(self, refuse: str | None = None) -> None:
        self.refuse = refuse

    async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
        if self.refuse is not None and self.refuse in request.split().tagged:
            raise CriticRequestError("too long", status=413, code="prompt_too_long")
        text = exact_critique(request.question, request.split().tagged)
        return answer_of(request, text)


class RecordingStore(MemoryPolicyStore):
    """The real store; it also keeps what was published."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[PolicyVersion] = []

    async def publish(self, policy: PolicyVersion) -> bool:
        self.published.append(policy)
        return await super().publish(policy)

    def lose(self) -> None:
        """As a server that was killed and comes back without its last seconds."""
        self._latest = None


class Run:
    """A run's queue, store and folder, and trainers that are started on them one after the other."""

    critic = ExactCritic

    def __init__(self, make_config: Callable[..., Config], tokenizer: Any, rollout_of: Callable[..., Rollout]) -> None:
        self.make_config = make_config
        self.tokenizer = tokenizer
        self.rollout_of = rollout_of
        self.broker = MemoryBroker()
        self.store = RecordingStore()

    def publish(self, version: int, names: list[str] = BATCH, *, whole: bool = True, group_size: int = 1) -> None:
        """What the solver does for one policy version; each group is a problem of its own."""
        queue = MemoryRolloutQueue(self.broker, "solver", self.make_config().queue)
        for start in range(0, len(names), group_size):
            problem = f"v{version:06d}/p{start // group_size}"
            group = [
                self.rollout_of(name, rollout_id=f"{problem}/{i}", group_id=f"{problem}/0", policy_version=version)
                for i, name in enumerate(names[start : start + group_size])
            ]
            asyncio.run(queue.publish(group))
        if whole:
            asyncio.run(self.store.announce_sampled(version))

    def trainer(
        self,
        *overrides: str,
        queue_class: type[MemoryRolloutQueue] = MemoryRolloutQueue,
        critic: ExactCritic | None = None,
        checker: Checker | None = None,
        prepare: Callable[[Any], None] = lambda queue: None,
    ) -> Trainer:
        config = self.make_config(*overrides)
        queue = queue_class(self.broker, "trainer", config.queue)
        prepare(queue)
        contexts = Contexts(config.arm.context, critic or ExactCritic(), config.critic.concurrency, checker)
        learner = Learner(config, self.tokenizer)
        return Trainer(config, learner, queue, self.store, contexts, StepJournal(config.folder.metrics))

    def train(self, *overrides: str, **others: Any) -> Trainer:
        return self.finish(self.trainer(*overrides, **others))

    def finish(self, trainer: Trainer) -> Trainer:
        async def work() -> None:
            async with asyncio.timeout(60):
                await trainer.train()

        asyncio.run(work())
        return trainer

    @property
    def folder(self) -> Path:
        return self.make_config().run_dir

    @property
    def status(self) -> QueueStatus:
        return self.broker.status()

    def rows(self, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / file).read_text().splitlines()]
        timing = {"update_seconds", "tokens_per_second"}
        return [{key: value for key, value in row.items() if key not in timing} for row in rows]


@pytest.fixture
def make_run(
    make_config: Callable[..., Config],
    tokenizer: Any,
    rollout_of: Callable[..., Rollout],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Run]:
    """``make_run("--run.name", "other")``: a run of its own queue and store, whose trainers all get the options."""
    monkeypatch.setattr(loop_module, "CLAIM_BLOCK_SECONDS", 0.05)
    return lambda *options: Run(lambda *more: make_config(*options, *more), tokenizer, rollout_of)


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run()
