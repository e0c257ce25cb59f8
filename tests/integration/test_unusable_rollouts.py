"""The trainer as a process, on a real queue that holds rollouts which no update can use."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stepalign_run.config import load_config
from stepalign_run.policy_store import open_policy_store
from stepalign_run.queue import open_queue
from stepalign_run.rollout import Rollout
from stepalign_solver.publications import PublicationJournal
from support.critic_processes import critic_process, write_config
from support.stacks import stepalign, without_evaluation

pytestmark = [pytest.mark.slow, pytest.mark.redis]

QUESTION = "3 + 4 * 7 - 2 + 1"
RIGHT = "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> <step_4> 7 + 1 = 8"
WRONG = RIGHT.replace("7 * 7 = 9", "7 * 7 = 8")
END = " </step_4> <answer> 8 </answer>"
OUTCOMES = {
    "right": "trained",
    "untagged": "trained",
    "no end": "trained",
    "another text": "skipped:text_is_not_its_tokens",
    "another vocabulary": "skipped:unknown_tokens",
    "wrong": "trained",
    "only the end": "trained",
    "too long": "skipped:too_long_for_the_model",
}
"""In the order of their ids."""


@pytest.fixture
def rollouts(make_rollout: Callable[..., Rollout]) -> list[Rollout]:
    tokenizer: Any = AutoTokenizer.from_pretrained(str(files("stepalign_lab") / "assets" / "solver"))
    end: int = tokenizer.eos_token_id
    problem = {"id": "p", "question": QUESTION, "answer": "8", "reference_solution": "7 is 4 + of 3 ; so 8"}

    def make(i: int, written: str, **fields: Any) -> Rollout:
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        common = {"run_id": "unusable", "rollout_id": f"v000000/p/{i}", "group_id": f"v000000/p/{i}"}
        own = {"problem": problem, "completion_token_ids": [*ids, end], "text": written, "behaviour_logprobs": None}
        return make_rollout(**(common | own | fields))

    cut = tokenizer(WRONG, add_special_tokens=False)["input_ids"]
    return [
        make(0, RIGHT + END),
        make(1, "3 + 4 = 7 so 7"),
        make(2, WRONG, completion_token_ids=cut, finish_reason="length"),
        make(3, RIGHT + END, text="another"),
        make(4, "", completion_token_ids=[10**9, end]),
        make(5, WRONG + END),
        make(6, ""),
        make(7, "3 " * 2999 + "3"),
    ]


def test_the_trainer_ends_names_them_and_the_audit_adds_up(
    redis_server: str, rollouts: list[Rollout], tmp_path: Path
) -> None:
    name = "unusable"
    file = without_evaluation(tmp_path)
    options = [
        "--run.name",
        name,
        "--run.dir",
        str(tmp_path),
        "--run.arm",
        "random_step_scope",
        "--queue.redis_url",
        redis_server,
    ]
    options += ["--trainer.steps", "1", "--trainer.batch", str(len(rollouts))]
    config = load_config(file, options)
    config.own_folder.claim()

    async def publish() -> None:
        queue, policies = open_queue(config.queue, name, "solver"), open_policy_store(config.queue, name)
        await queue.start()
        journal = PublicationJournal(config.run_dir)
        for rollout in rollouts:
            group = [rollout.model_copy(update={"run_id": name})]
            journal.offer(group)
            journal.answered(group, await queue.publish(group))
        await policies.announce_sampled(0)
        await policies.close()
        await queue.close()

    asyncio.run(publish())
    with critic_process(write_config(tmp_path)) as (_, critic):
        trainer = stepalign("trainer", str(file), *options, "--critic.url", critic)
        done = subprocess.run(trainer, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {f"v000000/p/{i}": outcome for i, outcome in enumerate(OUTCOMES.values())}
    (settled,) = [json.loads(line) for line in (config.run_dir / "outcomes.jsonl").read_text().splitlines()]
    assert settled["outcomes"] == expected
    skips = {rollout_id: outcome for rollout_id, outcome in expected.items() if outcome != "trained"}
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {line["rollout_id"]: f"skipped:{line['reason']}" for line in lines if line["event"] == "skipped"} == skips
    (row,) = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert row["outcomes"] == {"trained": 5, **dict.fromkeys(skips.values(), 1)}
    audit = stepalign("run", "audit", str(config.run_dir), "--json")
    environment = {**os.environ, "REDIS_URL": redis_server}
    audited = subprocess.run(audit, capture_output=True, text=True, timeout=60, check=True, env=environment)
    found = json.loads(audited.stdout)
    assert found["adds_up"] and (found["published"], found["trained"]) == (8, 5)
    assert found["skipped"] == {outcome.removeprefix("skipped:"): 1 for outcome in skips.values()}
