"""Train a model with TRL's SDPO, where the teacher sees a critique of the very attempt that it teaches about.

SDPO (arXiv 2601.20802) distills a model into itself: its teacher is the same model with more in its prompt, by default
another rollout of the problem that was right. Here that is the critique of the attempt: its right steps word for word,
the first wrong one put right, and carried on to the answer. So a problem that was never solved teaches too.

::

    pip install -e '.[critic-transformers,trl]'
    stepalign critic CONFIG --critic.port 8300
    python examples/trl_sdpo.py my_problems.jsonl path/to/model runs/sdpo --url http://127.0.0.1:8300

TRL has no option for this: feedback is a column of its dataset, ``privileged_context``, written before there is an
attempt. But it passes through ``teacher_context_builder.build``, which is called when the attempts are sampled.
``CritiqueTeacher`` wraps that builder: the column holds the problem, and the critique takes its place. A rollout that
got no critique has no teacher, and SDPO leaves it out of the loss.

The loss is SDPO's (reverse KL at the sampled tokens of the whole attempt), not that of ``stepalign trainer``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from stepalign import (
    CriticError,
    CritiqueRequest,
    CritiqueResponse,
    FinishReason,
    Problem,
    SyncCriticClient,
    grade,
    load_problems,
    load_prompt,
)
from stepalign.secret_files import read_secret

log = logging.getLogger(__name__)

TAUGHT, REFUSED, UNANSWERED = "taught", "refused", "unanswered"


class CritiqueTeacher:
    """SDPO's context ``builder``, with critiques of a batch's attempts in the place of the problems it is handed.

    ``outcomes`` counts every completion of the run under what became of its critique.
    """

    def __init__(self, builder: Any, decode: Callable[..., str], critic: SyncCriticClient) -> None:
        self._builder = builder
        self._decode = decode
        self._critic = critic
        self.outcomes = Counter[str]()
        self.last_metrics: dict[str, float] = {}
        """The log of SDPO after each batch: its own figures, and the share of completions by outcome."""

    def build(
        self, output: dict[str, Any], prompts: list[Any], rewards: torch.Tensor, feedbacks: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """As SDPO's. ``feedbacks`` are the problems as JSON, one for each row of ``completion_ids`` [B, T]."""
        if feedbacks is None:
            raise ValueError("the dataset has no column privileged_context, which must hold the problems")
        rows = zip(output["completion_ids"], output["completion_mask"], feedbacks, strict=True)
        answers = self._critic.critique_many(
            _request(Problem.model_validate_json(problem), self._decode(ids[mask.bool()], skip_special_tokens=True))
            for ids, mask, problem in rows
        )
        contexts = [answer.context if isinstance(answer, CritiqueResponse) else None for answer in answers]
        context = self._builder.build(output, prompts, rewards, feedbacks=contexts)
        self._count(answers)
        return context

    def _count(self, answers: list[CritiqueResponse | CriticError]) -> None:
        found = Counter(_outcome(answer) for answer in answers)
        self.outcomes += found
        self.last_metrics = dict(self._builder.last_metrics)
        for kind in (TAUGHT, REFUSED, UNANSWERED):
            count = sum(n for outcome, n in found.items() if outcome.startswith(kind))
            self.last_metrics[f"critic/{kind}"] = count / len(answers)
        if found[TAUGHT] < len(answers):
            log.warning(
                "%d of %d completions have no teacher: %s", len(answers) - found[TAUGHT], len(answers), dict(found)
            )
        for message in {str(answer) for answer in answers if isinstance(answer, CriticError)}:
            log.warning("no critique: %s", message)


def _request(problem: Problem, attempt: str) -> CritiqueRequest:
    return CritiqueRequest(
        question=problem.question,
        attempt=attempt,
        reference_solution=problem.reference_solution,
        answer=problem.answer,
    )


def _outcome(answer: CritiqueResponse | CriticError) -> str:
    if isinstance(answer, CriticError):
        return f"{UNANSWERED}: {type(answer).__name__}"
    return TAUGHT if answer.failure is None else f"{REFUSED}: {answer.failure.reason}"


def right_answer(
    completions: list[Any], completion_ids: list[Any], privileged_context: list[str], **_: Any
) -> list[Any]:
    """1 for a right answer, 0 for a wrong one or none. It is logged and does not teach: see ``distillation_weight``."""
    rows = zip(completions, completion_ids, map(Problem.model_validate_json, privileged_context), strict=True)
    return [
        grade(messages[0]["content"], len(ids), FinishReason.STOP, problem).correct for messages, ids, problem in rows
    ]


def dataset_of(problems: list[Problem], prompts: str) -> Dataset:
    """The columns that SDPO reads: the student's prompt, and the problem for the critic and the grader."""
    student = load_prompt(prompts, "student")
    rows = [
        {"prompt": student.fill(question=problem.question), "privileged_context": problem.model_dump_json()}
        for problem in problems
    ]
    return Dataset.from_list(rows)


def feedback_template(prompts: str) -> str:
    """The part of a teacher's prompt after the student's prompt, with SDPO's ``{feedback_raw}`` in it.

    SDPO adds to the last message only: examples before it, where a set has them, stay the student's. Of the set
    ``chat-v1``: "Below is a checked version of a solution. It is right from the first step to the answer. …"
    """
    asked, told = (load_prompt(prompts, name).messages[-1][1] for name in ("student", "teacher_critique"))
    if not told.startswith(asked):
        raise typer.BadParameter(f"the teacher's prompt of the set {prompts!r} does not go on from the student's")
    added = told.removeprefix(asked).replace("{{context}}", "\0")
    return added.replace("{", "{{").replace("}", "}}").replace("\0", "{feedback_raw}")


def main(
    problems: Annotated[Path, typer.Argument(help="JSON Lines: question, answer, reference_solution.")],
    model: Annotated[Path, typer.Argument(help="Folder with weights, tokenizer and chat template.")],
    out: Annotated[Path, typer.Argument(help="A new folder, for the trained model.")],
    url: Annotated[str, typer.Option(help="Address of the critic.")] = "http://127.0.0.1:8300",
    api_key_file: Annotated[Path | None, typer.Option(help="A file that holds the critic's API key.")] = None,
    prompts: Annotated[str, typer.Option(help="Prompt set of student and teacher.")] = "chat-v1",
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 100,
    batch: Annotated[int, typer.Option(min=2, help="Completions an update.")] = 32,
    samples: Annotated[int, typer.Option(min=2, help="Completions a problem; divides --batch.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 1024,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-5,
) -> None:
    """Train MODEL on PROBLEMS with SDPO, with the critiques of the critic at --url for a teacher."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise typer.BadParameter(f"{out} is not empty, and is left as it is: give a new folder")
    config = SDPOConfig(
        output_dir=str(out),
        include_environment_feedback=True,
        use_successful_as_teacher=False,  # Only the critique teaches,
        distillation_weight=1.0,  # and nothing but the teacher does.
        reprompt_template="{prompt}{feedback}",
        feedback_template=feedback_template(prompts),
        max_prompt_length=None,
        max_completion_length=max_new_tokens,
        num_generations=samples,
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=learning_rate,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    data = dataset_of(load_problems(problems), prompts)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    key = read_secret("--api-key-file", api_key_file) if api_key_file is not None else None
    with SyncCriticClient(url, api_key=key) as critic:
        critic.wait_ready()
        trainer: Any = SDPOTrainer(str(model), right_answer, config, data, processing_class=tokenizer)
        teacher = CritiqueTeacher(trainer.teacher_context_builder, tokenizer.decode, critic)
        trainer.teacher_context_builder = teacher
        trainer.train()
    trainer.save_model(str(out))
    for outcome, count in teacher.outcomes.most_common():
        typer.echo(f"{count:>6} {outcome}")
    if not teacher.outcomes[TAUGHT]:
        typer.echo("no completion had a critique: nothing was learned", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
