"""What the loader accepts travels: it is published, claimed, audited, reported, shown and written as problems again.

Hypothesis writes problem files with whatever JSON can hold. The queue's codec and server, the solver's journal, the
audit, the grading, the report and its page are the real ones.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from stepalign.critique.answers import answers_equal
from stepalign.errors import ProblemFileError
from stepalign.scoring import grade, score
from stepalign.types import FinishReason, Problem
from stepalign_report.build import build_report
from stepalign_report.page import build_page
from stepalign_run.audit import audit, read_records
from stepalign_run.config import Config, load_config
from stepalign_run.folder.report import read_report, write_report
from stepalign_run.queue import Admission, QueueStatus, open_queue
from stepalign_run.queue.snapshot import read_snapshot
from stepalign_run.rollout import Rollout
from stepalign_run.training_problems import load_training_problems
from stepalign_solver.band import Band, chosen_rows
from stepalign_solver.publications import PublicationJournal
from support.page_runs import token_rows

pytestmark = pytest.mark.redis

TOML = """
[model]
path = "m"
[data]
train = "t.jsonl"
validation = "t.jsonl"
test = "t.jsonl"
[critic]
backend = "program"
checker = "lab"
[evaluation]
samples = 1
[trainer]
steps = 1
"""
# Rarely what cannot travel, so that most files are accepted.
characters = st.characters(codec="utf-8") | st.sampled_from("\0\ud800\u2028\ufeff<>&\\\"{}[]'`")
texts = st.text(characters, max_size=15)
said = st.text(st.characters(codec="utf-8"), min_size=1, max_size=15).filter(str.strip)
numbers = st.integers() | st.floats()
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
problem_rows = st.fixed_dictionaries(
    {"question": said, "answer": said | numbers | st.sampled_from(["2 + <<2>>2\n#### 1,000", "</answer>", "####"])},
    optional={
        "id": st.from_regex(r"[A-Za-z0-9_.:/@+-]{1,150}", fullmatch=True) | st.integers(),
        "reference_solution": texts,
        "source": texts,
        "metadata": st.dictionaries(texts, json_values, max_size=3),
    },
)
METRICS = {
    "step": 1,
    "critiques": {"correct": 1},
    "outcomes": {"trained": 1},
    "alarms": [],
    **dict.fromkeys(("loss", "advantage_correct", "advantage_correct_below"), 0.5),
    **dict.fromkeys(("advantage_at_error", "advantage_after_error")),
}


def rollout_of(problem: Problem, config: Config) -> Rollout:
    return Rollout(
        run_id=config.run.name,
        rollout_id=f"v000000/{problem.id}/0",
        group_id=f"v000000/{problem.id}/0",
        problem=problem,
        policy_version=0,
        prompt_token_ids=[1],
        completion_token_ids=[2],
        text=f"<answer>{problem.answer}</answer>",
        finish_reason=FinishReason.STOP,
        sampling=config.solver.parameters(0),
        behaviour_logprobs=[-0.5],
    )


async def publish_and_claim(config: Config, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], QueueStatus]:
    queue = open_queue(config.queue, config.run.name, "one")
    journal = PublicationJournal(config.run_dir)
    await queue.start()
    try:
        for rollout in rollouts:
            journal.offer([rollout])
            admission = await queue.publish([rollout])
            assert admission is Admission.ADMITTED
            journal.answered([rollout], admission)
        claimed = await queue.claim(len(rollouts), 5.0)
        outcomes = {delivery.rollout.rollout_id: "trained" for delivery in claimed}
        config.folder.outcomes.write_text(json.dumps({"step": 1, "outcomes": outcomes}) + "\n")
        await queue.acknowledge({delivery.entry_id: "trained" for delivery in claimed})
        return [delivery.rollout for delivery in claimed], await queue.status()
    finally:
        await queue.close()


def evaluation_of(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    graded = [[grade(each.text, 1, each.finish_reason, each.problem, answers_equal)] for each in rollouts]
    scored = score(graded, 0)
    figures, marks = scored.as_report(), scored.by_problem.as_report()
    ids = [rollout.problem.id for rollout in rollouts]
    return {
        "validation": {"0": figures},
        "selected_step": 0,
        **dict.fromkeys(("base_test", "selected_test"), figures),
        "problem_ids": {"validation": ids, "test": ids},
        "by_problem": {"validation": {"0": marks}, "base_test": marks, "selected_test": marks},
        "problems_sha256": {},
        "temperature": 1.0,
        "max_new_tokens": 8,
    }


def shown_on_the_page(config: Config) -> list[dict[str, Any]]:
    """The problems of the rollouts that the page shows."""
    page = build_page([config.run_dir])
    _, _, rest = page.partition('type="application/json"')
    data = json.loads(rest[rest.index(">") + 1 : rest.index("</script>")])
    return [row["problem"] for row in data["runs"][0]["tokens"]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(problem_rows, min_size=1, max_size=4))
@example(rows=[{"question": "q", "answer": "1", "source": "\ud800"}])
@example(rows=[{"question": "q", "answer": "1", "metadata": {"a": float("nan")}}])
@example(rows=[{"question": "q\0", "answer": 1e22, "metadata": {"a": -(2**63) + 1, "b": 5e-324, "": [[]]}}])
def test_what_the_loader_accepts_travels(tmp_path: Path, redis_server: str, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path / uuid4().hex
    folder.mkdir()
    (folder / "run.toml").write_text(TOML)
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--run.dir", str(folder), "--run.name", f"travel-{folder.name}", "--queue.redis_url", redis_server]
    config = load_config(folder / "run.toml", options, {})
    try:
        problems = load_training_problems(config)
    except ProblemFileError:
        event("refused")
        return
    event("accepted")
    rollouts = [rollout_of(problem, config) for problem in problems]

    claimed, status = asyncio.run(publish_and_claim(config, rollouts))
    assert claimed == rollouts

    found = audit(read_records(config.run_dir), asyncio.run(read_snapshot(redis_server, config.run.name, 3.0)))
    assert found.problems == [] and found.trained == len(problems)

    config.folder.metrics.write_text(json.dumps(METRICS) + "\n")
    config.folder.evaluation.write_text(json.dumps(evaluation_of(rollouts)))
    shown = [problem.model_dump(include={"id", "question", "answer", "reference_solution"}) for problem in problems]
    token_row = token_rows(random.Random(0), config.arm_name, 1)[0]
    tokens = [token_row | {"rollout_id": f"v000000/{each['id']}/0", "problem": each} for each in shown]
    config.folder.tokens.write_text("".join(json.dumps(row) + "\n" for row in tokens))
    report = build_report(config, status, 1.0, 1)
    write_report(config.folder, report)
    assert read_report(config.folder) == report
    assert report.by_problem is not None and report.by_problem.ids.test == [problem.id for problem in problems]
    assert shown_on_the_page(config) == shown

    again = folder / "again.jsonl"
    chosen = chosen_rows(problems, [1] * len(problems), Band(1, 0, 1))
    again.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), encoding="utf-8")
    reread = load_training_problems(config.model_copy(update={"data": config.data.model_copy(update={"train": again})}))
    assert [problem.model_copy(update={"metadata": {}}) for problem in reread] == [
        problem.model_copy(update={"metadata": {}}) for problem in problems
    ]
    assert [problem.metadata.pop("band") for problem in reread] == [{"solved": 1, "samples": 1}] * len(problems)
    kept = [{key: value for key, value in problem.metadata.items() if key != "band"} for problem in problems]
    assert [problem.metadata for problem in reread] == kept
