from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from stepalign.commands.application import build_app
from stepalign.critique.trace import parse_trace
from stepalign.errors import ConfigError
from stepalign.problems import load_problems
from stepalign_models.loading import load_policy, load_tokenizer
from stepalign_models.sampling import Sampler
from stepalign_run.config import Config, load_config
from stepalign_run.rollout import SamplingParameters
from stepalign_solver.band import Band, chosen_rows, solved_counts
from stepalign_solver.prompts import StudentPrompts

LAB = Path(__file__).parents[3] / "configs" / "lab.toml"


def silent(done: int, of: int) -> None:
    pass


def test_how_often_a_problem_is_solved_does_not_depend_on_the_batch(make_config: Callable[..., Config]) -> None:
    config = make_config("--solver.max_new_tokens", "24")
    once = solved_counts(config, config.data.train, 6, silent)
    told: list[tuple[int, int]] = []
    again = solved_counts(
        make_config("--solver.max_new_tokens", "24", "--solver.batch", "7"),
        config.data.train,
        6,
        lambda done, of: told.append((done, of)),
    )
    assert once == again and told == [(7, 24), (14, 24), (21, 24), (24, 24)]


def band(*words: str) -> Result:
    return CliRunner().invoke(build_app(), ["band", str(LAB), *words])


def test_the_command_chooses_what_the_solver_solves_now_and_then(tmp_path: Path) -> None:
    """The lab's solver is confidently wrong on its problems: with its own answers as the known ones it solves them."""
    config = load_config(LAB, environ={})
    tokenizer = load_tokenizer(config.model.path)
    problems = load_problems(config.data.train)[:6]
    prompts = StudentPrompts(config, tokenizer, problems, config.data.train)
    sampler = Sampler(load_policy(config.model, None, merge=False), tokenizer)
    certain = SamplingParameters(top_k=1, max_new_tokens=64, seed=0)
    said = sampler.sample([prompts.token_ids[problem.id] for problem in problems], [certain] * len(problems))
    answers = [parse_trace(completion.text).answer for completion in said]
    known = [problem.answer for problem in problems] + [answer.body for answer in answers if answer is not None]
    assert len(known) == 12
    candidates = tmp_path / "candidates.jsonl"
    rows = [
        {"id": f"{i}", "question": problems[i % 6].question, "answer": answer, "metadata": {"kept": i}}
        for i, answer in enumerate(known)
    ]
    candidates.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tmp_path / "band.jsonl"
    result = band(str(candidates), "--to", str(target), "--samples", "8", "--at-least", "5", "--at-most", "8")
    assert result.exit_code == 0, result.output
    chosen = load_problems(target)
    assert {int(problem.id) for problem in chosen} <= set(range(6, 12)) and len(chosen) >= 4
    for problem in chosen:
        assert problem.metadata["kept"] == int(problem.id) and 5 <= problem.metadata["band"]["solved"] <= 8
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["chosen"] == len(chosen) and summary["of"] == 12 and sum(summary["solved"].values()) == 12


def test_a_band_without_a_problem_writes_no_file_and_says_what_was_solved(tmp_path: Path) -> None:
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text(json.dumps({"question": "3 + 4 * 7", "answer": "no digit"}) + "\n")
    target = tmp_path / "band.jsonl"
    result = band(str(candidates), "--to", str(target), "--samples", "2", "--at-least", "1", "--at-most", "2")
    assert isinstance(result.exception, ConfigError) and "{0: 1}" in str(result.exception)
    assert not target.exists()


def test_the_band_keeps_the_candidates_order_and_each_ones_solved_count(
    make_config: Callable[..., Config],
) -> None:
    problems = load_problems(make_config().data.train)
    rows = chosen_rows(problems, [0, 3, 4, 5], Band(samples=5, at_least=3, at_most=4))
    assert [row["id"] for row in rows] == [problems[1].id, problems[2].id]
    assert [row["metadata"] for row in rows] == [{"band": {"solved": n, "samples": 5}} for n in (3, 4)]


@pytest.mark.parametrize(("samples", "low", "high"), [(0, 0, 0), (4, 3, 2), (4, 0, 5), (4, -1, 2)])
def test_an_impossible_band_is_refused(samples: int, low: int, high: int) -> None:
    with pytest.raises(ConfigError, match="at least"):
        Band(samples, low, high)
