"""No rollout's content ends a run: each is trained on, or skipped, counted and named. From queue to ledger.

Models are tiny and random, with tokenizers of the kinds that models have and embeddings padded past them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from transformers import LlamaConfig, LlamaForCausalLM

from stepalign.critique.trace import parse_trace
from stepalign.errors import UnusableReason
from stepalign.types import CritiqueRequest, CritiqueResponse, FailureReason
from stepalign_run.config import Config, load_config, shipped_arms
from stepalign_run.queue import Delivery
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.contexts import Contexts
from stepalign_trainer.batch.examples import ModelLimits
from stepalign_trainer.batch.item import make_items
from stepalign_trainer.objectives.rewards import Rewards
from support.critic_answers import answer_of
from support.model_tokenizers import KINDS

Run = Any  # that of conftest.py
PROBLEM = {"id": "p0", "question": "3 + 4?", "answer": "7", "reference_solution": "It is 3 + 4, so 7."}
PADDED = 448
POSITIONS = 4096
"""More than the longest good rollout needs, fewer than the 10,000 tokens of the longest of all."""

TEXTS = {
    "right": "<step_1>3 + 4 = 7</step_1>\n<answer>7</answer>",
    "wrong": "<step_1>3 + 4 = 8</step_1>\n<answer>8</answer>",
    "untagged": "First 3 + 4 = 8.\nThe answer is \\boxed{8}.",
    "one sentence": "3 + 4 = 8",
    "untagged, right": "First 3 + 4 = 7.\nThe answer is \\boxed{7}, I think.",
    "tags astray": "</step_1><step_7><step_7><answer></answer></step_7> 8 <answer>8</answer><answer>",
    "broken tags": "<step_1>3 + 4 = 8</step_2><step_1><answer> 8",
    "NUL": "<step_1>3 +\x00 4 = 8</step_1><answer>\x008</answer>",
    "U+FFFD": "<step_1>3 \ufffd 4 = 8</step_1><answer>8</answer>",
    "other scripts": "<step_1>你好 naïve 👩\u200d👩\u200d👧 = 8</step_1><answer>八</answer>",
    "control words": "<|start|>user\n<think>3<|end|></think><tool_call>",
    "a lone mark": "1.",
    "empty": "",
    "whitespace": " \n\t \n\n  ",
}
SKIPPED = {
    "text of another": UnusableReason.TEXT_IS_NOT_ITS_TOKENS,
    "an id past the embeddings": UnusableReason.UNKNOWN_TOKENS,
    "an enormous id": UnusableReason.UNKNOWN_TOKENS,
    "an unknown id in the prompt": UnusableReason.UNKNOWN_TOKENS,
    "10,000 tokens": UnusableReason.TOO_LONG_FOR_THE_MODEL,
}
BROKEN = ["bytes", "an id past the vocabulary", "only an end", "cut in a character"]
"""Odd, and trained on."""
ALL = [*TEXTS, *BROKEN, *SKIPPED, "cut off"]
# Rollouts of a group are published together; 24 are three groups of eight.
assert len(ALL) == 24


class AnyCritic:
    """Calls the first step of any attempt wrong, and an attempt without steps incomplete."""

    async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
        first = next(iter(parse_trace(request.split().tagged).steps), None)
        said = f"<step_1>3 + 4 = 7</step_1><continued/><answer>{request.answer}</answer><verdict>incomplete</verdict>"
        if first is not None:
            number = first.number
            said = (
                f"<step_{number}>4 and 3 make 7</step_{number}><corrected/><answer>{request.answer}</answer>"
                "<verdict>incorrect</verdict>"
            )
        return answer_of(request, said)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model with a tokenizer of that kind."""

    @cache
    def make(kind: str) -> Path:
        path: Path = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=PADDED, max_position_embeddings=POSITIONS, **sizes)  # type: ignore[arg-type]
        config.eos_token_id = KINDS[kind]().eos_token_id
        LlamaForCausalLM(config).save_pretrained(path)
        KINDS[kind]().save_pretrained(path)
        (path / "train.jsonl").write_text('{"id": "p", "question": "3 + 4?", "answer": "7"}\n', encoding="utf-8")
        return path

    return make


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of the tokenizer, given by a test's parameters."""
    return request.param


@pytest.fixture
def tokenizer(kind: str) -> Any:
    return KINDS[kind]()


@pytest.fixture
def make_config(world: Callable[[str], Path], tmp_path: Path, kind: str) -> Callable[..., Config]:
    file = tmp_path / "config.toml"
    file.write_text(
        f"""
        run = {{ name = "any", dir = "{tmp_path / "runs"}" }}
        model = {{ path = "{world(kind)}", device = "cpu" }}
        data = {{ train = "{world(kind) / "train.jsonl"}" }}
        critic = {{ backend = "program", checker = "lab" }}
        queue = {{ capacity = {2 * len(ALL)} }}
        solver = {{ max_prompt_tokens = 1500, max_new_tokens = 64 }}

        [trainer]
        steps = 1
        batch = {len(ALL)}
        max_teacher_prompt_tokens = 2000
        micro_batch = 4
        lora = {{ rank = 2, alpha = 4 }}
        """.replace("\n        ", "\n"),
        encoding="utf-8",
    )
    return lambda *overrides: load_config(file, overrides, environ={})


def ids_of(kind: str, name: str) -> tuple[list[int], str]:
    """The completion's ids, EOS included where it stopped, and why it ended."""
    tokenizer = KINDS[kind]()
    end = tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    broken = [vocabulary[token] for token in ("<0xF0>", "<0x41>", "<0x9F>", "<0xFF>") if token in vocabulary]
    broken = broken or [vocabulary[token] for token in ("ð", "A", "Ł", "ÿ")]
    odd: dict[str, list[int]] = {
        "bytes": [*broken, *broken[::-1], end],
        "an id past the vocabulary": [*broken, PADDED - 1, PADDED - 2, end],
        "only an end": [end],
        "cut in a character": broken[:1],
        "text of another": [broken[1], end],
        "an id past the embeddings": [broken[1], PADDED, end],
        "an enormous id": [2**31 - 1, end],
        "10,000 tokens": [*broken[1:2] * 10_000, end],
    }
    if name in odd:
        return odd[name], "length" if name == "cut in a character" else "stop"
    text = TEXTS["wrong"][:21] if name in ("cut off", "an unknown id in the prompt") else TEXTS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return (ids, "length") if name == "cut off" else ([*ids, end], "stop")


def written(tokenizer: Any, ids: list[int], finish: str) -> str:
    """The text that a solver would send with these ids."""
    content = ids if finish == "length" else ids[:-1]
    return tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.fixture
def rollout_of(kind: str, tokenizer: Any) -> Callable[..., Rollout]:
    """The rollout of that name."""

    def make(name: str, **overrides: Any) -> Rollout:
        ids, finish = ids_of(kind, name)
        fields: dict[str, Any] = {
            "run_id": "any",
            "problem": PROBLEM | {"id": f"p{ALL.index(name) // 8}"},
            "prompt_token_ids": [PADDED + 7] if name == "an unknown id in the prompt" else [5, 6, 7],
            "completion_token_ids": ids,
            "text": "8" if name == "text of another" else written(tokenizer, ids, finish),
            "finish_reason": finish,
            "sampling": {"max_new_tokens": 64, "seed": 0},
        }
        return Rollout.model_validate(fields | overrides)

    return make


@pytest.mark.parametrize(
    ("kind", "arm"),
    [("llama2", arm) for arm in shipped_arms()] + [(kind, "random_step_scope") for kind in KINDS if kind != "llama2"],
    indirect=["kind"],
)
def test_a_run_ends_and_every_rollout_is_trained_on_or_skipped_and_named(run: Run, arm: str) -> None:
    run.publish(0, ALL, group_size=8)
    with capture_logs() as lines:
        run.train("--run.arm", arm, critic=AnyCritic())
    (noted,) = run.rows("outcomes.jsonl")
    outcomes: dict[str, str] = noted["outcomes"]
    by_name = {name: outcomes[f"v000000/p{i // 8}/{i % 8}"] for i, name in enumerate(ALL)}
    unusable = {name: f"skipped:{reason.value}" for name, reason in SKIPPED.items()}
    if arm == "full_repetition":
        # The teacher's prompt quotes it.
        unusable["10,000 tokens"] = "skipped:teacher_prompt_too_long"
    assert {name: outcome for name, outcome in by_name.items() if name in SKIPPED} == unusable
    assert {by_name[name] for name in ("right", "wrong", "untagged", "bytes", "only an end")} == {"trained"}
    logged = {line["rollout_id"]: f"skipped:{line['reason']}" for line in lines if line["event"] == "skipped"}
    assert logged == {rollout_id: outcome for rollout_id, outcome in outcomes.items() if outcome != "trained"}
    (row,) = run.rows()
    counted = dict(sorted(Counter(outcomes.values()).items()))
    assert row["outcomes"] == counted and row["trained_rollouts"] == counted["trained"]
    status = run.status
    assert status.balanced and (status.published, status.length, status.dead) == (len(ALL), 0, 0)
    assert {"trained": status.trained} | {f"skipped:{name}": n for name, n in status.skipped.items()} == counted
    assert [policy.version for policy in run.store.published] == [0, 1]


@pytest.mark.parametrize("kind", ["qwen"], indirect=True)
def test_a_batch_of_unusable_rollouts_alone_is_an_empty_update(run: Run) -> None:
    run.publish(0, [*SKIPPED])
    run.train("--trainer.batch", str(len(SKIPPED)), critic=AnyCritic())
    (row,) = run.rows()
    assert (row["trained_rollouts"], row["loss"]) == (0, 0.0)
    assert run.status.balanced and run.status.skipped == {
        "text_is_not_its_tokens": 1,
        "too_long_for_the_model": 1,
        "unknown_tokens": 3,
    }


@pytest.mark.parametrize("kind", ["qwen"], indirect=True)
@pytest.mark.parametrize("arm", ["stepalign_scoped", "stepalign", "random_step_scope", "shuffled", "full_repetition"])
def test_critiques_of_another_text_cost_their_rollouts_and_not_the_run(run: Run, arm: str) -> None:
    """As of a critic of another version, whose spans are not ours."""

    class Shifted(AnyCritic):
        async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
            answer = await super().critique(request, request_id)
            if answer.critique is None or answer.critique.alignment.first_difference is None:
                return answer
            start, end = answer.critique.alignment.first_difference
            moved = answer.critique.alignment.model_copy(update={"first_difference": (start + 900, end + 900)})
            critique = answer.critique.model_copy(update={"alignment": moved, "first_error_step": 9})
            return answer.model_copy(update={"critique": critique})

    names = ["wrong", "untagged", "one sentence", "empty"]
    run.publish(0, names)
    run.train("--run.arm", arm, "--trainer.batch", "4", critic=Shifted())
    assert run.status.skipped == {"critique_is_of_another_text": 3} and run.status.trained == 1
    assert run.status.balanced and len(run.rows()) == 1


@pytest.mark.parametrize("kind", ["qwen"], indirect=True)
def test_a_checker_that_fails_on_a_rollout_costs_a_figure_and_not_the_run(run: Run) -> None:
    def failing(question: str, attempt: str) -> str:
        return attempt.split("<answer>")[1]

    run.publish(0, ["right", "wrong", "untagged", "empty"])
    with capture_logs() as lines:
        run.train("--run.arm", "refsol", "--trainer.batch", "4", checker=failing)
    assert run.status.trained == 4
    failed = [line for line in lines if line["event"] == "no exact critique"]
    assert len(failed) == 1 and failed[0]["rollout_id"].startswith("v000000/p3")
    assert "the checker failed on a solution: IndexError" in failed[0]["error"]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), places=st.lists(st.integers(0, PADDED), min_size=1, max_size=40), stopped=st.booleans())
@pytest.mark.parametrize("arm", ["stepalign_scoped", "random_step_scope"])
@pytest.mark.parametrize("name", KINDS)
def test_any_ids_make_an_example_or_a_named_skip(
    world: Callable[[str], Path], name: str, arm: str, data: st.DataObject, places: list[int], stopped: bool
) -> None:
    tokenizer = KINDS[name]()
    pieces = data.draw(st.lists(st.sampled_from([*TEXTS.values(), "\n", "So the answer is 8."]), max_size=3))
    text_ids = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    ids = [*text_ids, *places, *([tokenizer.eos_token_id] if stopped else [])]
    finish = "stop" if stopped else "length"
    fields = {"run_id": "any", "rollout_id": "r", "group_id": "g", "policy_version": 0, "problem": PROBLEM}
    fields |= {"prompt_token_ids": [5], "completion_token_ids": ids, "text": written(tokenizer, ids, finish)}
    rollout = Rollout.model_validate(fields | {"finish_reason": finish, "sampling": {"max_new_tokens": 64, "seed": 0}})
    folder = world(name)
    critic = ("--critic.backend", "program", "--critic.checker", "lab")
    model = ("--model.path", str(folder), "--data.train", str(folder / "train.jsonl"), "--run.arm", arm)
    (folder / "empty.toml").touch()
    config = load_config(folder / "empty.toml", [*critic, *model], environ={})
    contexts = asyncio.run(Contexts(config.arm.context, AnyCritic(), 1).fetch([rollout]))
    limits = ModelLimits(PADDED, POSITIONS)
    (item,) = make_items(config, tokenizer, limits, [Delivery("0-1", rollout, 1)], contexts, Rewards())
    if item.example is None:
        reasons = {f"skipped:{reason.value}" for reason in UnusableReason}
        assert item.outcome in reasons | {f"skipped:critique_{reason.value}" for reason in FailureReason}
        assert PADDED in places or contexts[0].context is None
        return
    groups = item.example.groups
    assert 0 < groups.in_scope <= len(ids) and groups.aligned
    assert groups.first_error is None or 0 <= groups.first_error < len(ids)
