"""The token view: what is written, and whether its figures are those of the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepalign_lab.checker import exact_critique
from stepalign_run.fingerprint import fingerprint
from stepalign_trainer import loop as loop_module
from stepalign_trainer.durable.checkpoint import load_checkpoint
from stepalign_trainer.update.learner import Learner

pytestmark = [pytest.mark.slow, pytest.mark.numeric]

Run = Any  # that of conftest.py
TWO = ("--trainer.steps", "2")


def publish_all(run: Run, names: list[str] | None = None) -> None:
    for version in (0, 1):
        run.publish(version) if names is None else run.publish(version, names)


def logprobs(learner: Learner, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """``[T, V]`` in float64, through the whole model."""
    return learner.logits(prompt, completion).double().log_softmax(-1)


def test_a_row_holds_what_the_report_shows(run: Run, tokenizer: Any) -> None:
    publish_all(run)
    run.train(*TWO, "--trainer.token_view", "3")
    rows = run.rows("tokens.jsonl")
    assert [(row["step"], row["rollout_id"]) for row in rows] == [
        (version + 1, f"v00000{version}/p{i}/0") for version in (0, 1) for i in range(3)
    ]
    rollouts = [run.rollout_of(name) for name in ("right", "wrong_step", "missing_step")] * 2
    for row, rollout in zip(rows, rollouts, strict=True):
        assert row.keys() == {
            *("step", "rollout_id", "problem", "verdict", "correct", "finish_reason", "first_error_token"),
            *("in_scope", "tokens", "logprob", "contexts"),
        }
        assert row["problem"] == rollout.problem.model_dump(include={"id", "question", "answer", "reference_solution"})
        assert "".join(row["tokens"]) == rollout.text and row["tokens"][-1] == ""
        assert row["tokens"][:3] == ["<step_1>", " 3", " +"]
        assert len(row["tokens"]) == len(row["logprob"]) == len(rollout.completion_token_ids)
        assert row["contexts"].keys() == {"critique", "reference"}
        assert row["contexts"]["critique"]["text"] == run.rollout_of("right").text
        assert row["contexts"]["reference"]["text"] == rollout.problem.reference_solution
        for context in row["contexts"].values():
            assert context.keys() == {"text", "advantage", "kl"}
            assert len(context["advantage"]) == len(context["kl"]) == len(row["tokens"])
    shown = [(row["verdict"], row["correct"], row["first_error_token"], row["in_scope"]) for row in rows[:3]]
    assert shown == [("correct", True, None, 32), ("incorrect", False, 12, 14), ("unjustified", True, 8, 14)]


def test_figures_are_those_of_the_student_before_the_update(run: Run, tokenizer: Any) -> None:
    publish_all(run)
    run.train(*TWO)
    rows = [row for row in run.rows("tokens.jsonl") if row["rollout_id"].endswith("/p1/0")]
    rollout = run.rollout_of("wrong_step")
    completion, prompt = rollout.completion_token_ids, rollout.prompt_token_ids
    for row, step in zip(rows, (0, 1), strict=True):
        learner = Learner(run.make_config(), tokenizer)
        if step:
            folder = run.folder / "checkpoints" / "step-000001"
            load_checkpoint(learner, folder, fingerprint(run.make_config()))
        student = logprobs(learner, prompt, completion)
        chosen = range(len(completion)), completion
        assert row["logprob"] == pytest.approx(student[chosen].tolist(), abs=2e-4)
        for kind in ("critique", "reference"):
            text = f"<bos><user>question : 3 + 4 * 7 - 2 + 1 {kind} : {row['contexts'][kind]['text']}<assistant>"
            with learner.teacher():
                teacher = logprobs(learner, tokenizer(text, add_special_tokens=False)["input_ids"], completion)
            advantage = (teacher - student)[chosen]
            kl = (teacher.exp() * (teacher - student)).sum(-1)
            assert row["contexts"][kind]["advantage"] == pytest.approx(advantage.tolist(), abs=2e-4)
            assert row["contexts"][kind]["kl"] == pytest.approx(kl.tolist(), abs=2e-4)
    assert rows[0]["contexts"]["critique"]["advantage"][12] < -3  # the paper's picture
    assert rows[0]["logprob"] != rows[1]["logprob"]


def test_the_arms_own_context_is_shown_beside_critique_and_reference(make_run: Callable[..., Run]) -> None:
    run = make_run("--run.arm", "other_problem")
    run.publish(0, ["wrong_step", "other_wrong", "right", "other_right"])
    run.train("--trainer.steps", "1", checker=exact_critique)
    first, second = run.rows("tokens.jsonl")[:2]
    assert first["contexts"].keys() == {"other_problem", "critique", "reference"}
    assert first["contexts"]["other_problem"]["text"] == second["problem"]["reference_solution"]
    assert (first["verdict"], first["first_error_token"], first["in_scope"]) == ("incorrect", 12, 32)


def test_a_context_over_the_teachers_budget_is_left_out(run: Run) -> None:
    """A skipped rollout is shown all the same. The critique makes a prompt of 47 tokens, the reference of 46."""
    run.publish(0)
    run.train("--trainer.steps", "1", "--trainer.max_teacher_prompt_tokens", "46")
    rows = run.rows("tokens.jsonl")
    assert len(rows) == 4 and all(row["contexts"].keys() == {"reference"} for row in rows)


def test_a_rollout_that_was_cut_off_has_no_token_for_eos(run: Run, rollout_of: Callable[..., Any]) -> None:
    run.rollout_of = lambda name, **fields: rollout_of(name, "length", **fields)
    run.publish(0, ["unfinished"] * 4)
    run.train("--trainer.steps", "1")
    row = run.rows("tokens.jsonl")[0]
    assert (row["finish_reason"], row["correct"], row["verdict"]) == ("length", False, "incomplete")
    assert row["tokens"][-1] == " *" and len(row["tokens"]) == 10


def test_an_update_that_is_made_again_replaces_its_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_all(run)
    save = loop_module.save_checkpoint

    def full_disk(*arguments: Any) -> Any:
        if arguments[2].step == 2:
            raise OSError("no space left")
        return save(*arguments)

    monkeypatch.setattr(loop_module, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="no space"):
        run.train(*TWO)
    interrupted = run.rows("tokens.jsonl")
    assert [row["step"] for row in interrupted] == [1] * 4 + [2] * 4
    monkeypatch.setattr(loop_module, "save_checkpoint", save)
    run.train(*TWO)
    assert run.rows("tokens.jsonl") == interrupted


def test_without_a_token_view_nothing_is_written(run: Run) -> None:
    run.publish(0)
    run.train("--trainer.steps", "1", "--trainer.token_view", "0")
    assert not (run.folder / "tokens.jsonl").exists()


def test_every_problem_is_shown_before_any_a_second_time(run: Run) -> None:
    run.publish(0, ["right", "wrong_step", "other_wrong", "missing_step"])
    run.train("--trainer.steps", "1", "--trainer.token_view", "3")
    assert [row["rollout_id"][-4:] for row in run.rows("tokens.jsonl")] == ["p0/0", "p2/0", "p1/0"]
