"""How many critiques of a model validate, and how many of these are right: ``benchmarks/results/critiques.json``.

    make bench-critiques

Attempts are completions of a base solver, sampled as for training. Each critic is the real service over HTTP with its
shipped prompts in free decoding, one stricter retry included where the prompt set has one: an aligned critique cannot
fail for its form. An answer is *valid* when it aligns with the attempt, *right* when it names the same verdict and the
same first wrong step as the task's exact checker (tasks without one have no such figure). The table goes into
``docs/critique.md``. The target converts SmolLM2 first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from benchmarks.arms_benchmark import ROOT, run_as_program
from benchmarks.comparison_section import markdown_table, replace_section
from benchmarks.errors import BenchError
from benchmarks.report import machine, rounded
from stepalign.client import SyncCriticClient
from stepalign.critique.alignment import validate_critique
from stepalign.errors import CriticError
from stepalign.plugins import load_checker
from stepalign.types import Critique, CritiqueRequest, CritiqueResponse
from stepalign_run.config import load_config
from stepalign_run.folder.files import replace_text
from stepalign_solver.band import base_completions

RESULTS = ROOT / "benchmarks" / "results" / "critiques.json"
PAGE = ROOT / "docs" / "critique.md"
_START_SECONDS = 300.0
_ANSWER_SECONDS = 3600.0
_95_PERCENT = 1.959964


@dataclass(frozen=True)
class Task:
    """Problems, their solver and its attempts at each, and the exact checker that knows the right steps."""

    title: str
    config: str
    problems: str
    samples: int
    checker: str | None


@dataclass(frozen=True)
class Critic:
    """``overrides`` of the task's configuration make it."""

    title: str
    task: Task
    overrides: tuple[str, ...] = ()


CHAINS = Task("chains of digits", "configs/lab.toml", "lab/stepalign_lab/assets/problems/test.jsonl", 4, "lab")
SUMS = Task("sums of three digits", "configs/sums.toml", "examples/sums/validation.jsonl", 4, "sums")
WORDS = Task("word problems", "configs/smollm2.toml", "examples/word_problems.jsonl", 2, None)
_SMOLLM2 = ("--critic.backend", "transformers", "--critic.path", ".cache/smollm2", "--critic.prompts", "chat-v1")
DECODING = ("--critic.decoding", "free")
_ROOM = ("--critic.max_prompt_tokens", "2560", "--critic.max_new_tokens", "256", "--critic.max_batch", "4")
CRITICS = {
    "lab": Critic("the lab's critic, 0.8M", CHAINS),
    "lab-program": Critic("exact program `lab`", CHAINS, ("--critic.backend", "program", "--critic.checker", "lab")),
    "sums-program": Critic("exact program `sums`", SUMS),
    "smollm2-sums": Critic("SmolLM2-135M-Instruct", SUMS, (*_SMOLLM2, *_ROOM)),
    "smollm2-words": Critic("SmolLM2-135M-Instruct", WORDS, ("--critic.prompts", "chat-v1")),
}


def requests_of(task: Task) -> list[CritiqueRequest]:
    """Attempts of the task's base solver, as the trainer would send them."""
    config = load_config(ROOT / task.config)

    def progress(done: int, of: int) -> None:
        print(f"{task.title}: {done} of {of} attempts", end="\r", flush=True)

    sampled = base_completions(config, ROOT / task.problems, task.samples, "critiques", progress)
    print()
    return [
        CritiqueRequest(
            question=problem.question,
            attempt=completion.text,
            reference_solution=problem.reference_solution,
            answer=problem.answer,
        )
        for problem, completion in sampled
    ]


@contextmanager
def serving(critic: Critic) -> Iterator[str]:
    """The service as its command starts it. Raises BenchError when it does not get ready."""
    with tempfile.TemporaryDirectory() as runs:
        address = Path(runs) / "critic.url"
        own = ["--critic.port", "0", "--critic.address_file", str(address)]
        config = str(ROOT / critic.task.config)
        command = [sys.executable, "-m", "stepalign.cli", "critic", config, *own, *DECODING, *critic.overrides]
        log = Path(runs) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            yield _address(process, address, log)
        finally:
            process.terminate()
            process.wait(60)


def _address(process: subprocess.Popen[bytes], file: Path, log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"the critic did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.1)
    return file.read_text(encoding="utf-8").strip()


def ask(url: str, requests: Sequence[CritiqueRequest]) -> list[CritiqueResponse]:
    """Raises BenchError when one of them got no answer: shares of some would mean nothing."""
    with SyncCriticClient(url, timeout=_ANSWER_SECONDS) as client:
        client.wait_ready(_START_SECONDS)
        answers = client.critique_many(requests, concurrency=16)
    failed = [answer for answer in answers if isinstance(answer, CriticError)]
    if failed:
        raise BenchError(f"{len(failed)} of {len(answers)} requests got no answer; the first: {failed[0]}")
    return [answer for answer in answers if isinstance(answer, CritiqueResponse)]


def figures_of(critic: Critic, requests: Sequence[CritiqueRequest], answers: Sequence[CritiqueResponse]) -> Any:
    valid = [answer.critique is not None for answer in answers]
    reasons = Counter(answer.failure.reason.value for answer in answers if answer.failure is not None)
    retried = [answer for answer in answers if answer.retried is not None]
    figures: dict[str, Any] = {
        "critic": critic.title,
        "identity": answers[0].critic.model_dump(),
        "task": critic.task.title,
        "attempts": len(answers),
        "valid": sum(valid),
        "valid_interval": wilson(sum(valid), len(valid)),
        "refused": dict(reasons.most_common()),
        "asked_again": len(retried),
        "valid_on_asking_again": sum(answer.critique is not None for answer in retried),
        "completion_tokens": sum(answer.usage.completion_tokens for answer in answers),
        "attempts_by_rule": dict(Counter(answer.attempt.rule.value for answer in answers).most_common()),
    }
    if critic.task.checker is not None:
        agreed = [right(critic.task.checker, *pair) for pair in zip(requests, answers, strict=True)]
        figures |= {"right": sum(agreed), "right_interval": wilson(sum(agreed), len(agreed))}
    return figures


def right(checker: str, request: CritiqueRequest, answer: CritiqueResponse) -> bool:
    """Whether the critique has the verdict and the first wrong step of the checker's, which has to be valid itself."""
    if answer.critique is None:
        return False
    attempt = request.split().tagged
    exact = validate_critique(load_checker(checker)(request.question, attempt), attempt, known_answer=request.answer)
    named = answer.critique.verdict, answer.critique.first_error_step
    return isinstance(exact, Critique) and named == (exact.verdict, exact.first_error_step)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927), without continuity correction."""
    z2, share = _95_PERCENT**2, successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _95_PERCENT * ((share * (1 - share) + z2 / (4 * trials)) / trials) ** 0.5 / (1 + z2 / trials)
    return centre - half, centre + half


def _row(found: dict[str, Any]) -> list[str]:
    def share(name: str) -> str:
        if name not in found:
            return "–"
        low, high = found[f"{name}_interval"]
        return f"{found[name]} ({100 * low:.0f}–{100 * high:.0f} %)"

    refused = ", ".join(f"{count} {reason}" for reason, count in found["refused"].items()) or "–"
    again = f"{found['valid_on_asking_again']} of {found['asked_again']}" if found["asked_again"] else "–"
    cells = [str(found["attempts"]), share("valid"), share("right"), again, refused]
    return [found["critic"], f"`{found['identity']['prompt_version']}`", found["task"], *cells]


def write_table(known: dict[str, Any]) -> None:
    heads = ["critic", "prompts", "task", "attempts", "valid", "right", "valid on asking again", "refused at last"]
    rows = [_row(known["critics"][name]) for name in CRITICS if name in known["critics"]]
    replace_section(PAGE, "critiques", markdown_table(heads, rows))


def main(
    critic: list[str] = typer.Option(tuple(CRITICS), help="Critics to measure; others keep their figures."),
) -> None:
    unknown = sorted(set(critic) - CRITICS.keys())
    if unknown:
        raise BenchError(f"no critic is called {', '.join(unknown)}; there are {', '.join(sorted(CRITICS))}")
    described = machine()
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"critics": {}}
    attempts: dict[Task, list[CritiqueRequest]] = {}
    for name in critic:
        measured = CRITICS[name]
        if measured.task not in attempts:
            attempts[measured.task] = requests_of(measured.task)
        requests = attempts[measured.task]
        began = time.monotonic()
        with serving(measured) as url:
            answers = ask(url, requests)
        figures = figures_of(measured, requests, answers)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        known["critics"][name] = {**figures, "seconds": time.monotonic() - began, "date": when, "machine": described}
        replace_text(RESULTS, json.dumps(rounded(known), indent=1, ensure_ascii=False) + "\n")
        write_table(known)
        print(f"{measured.title}, {measured.task.title}: {figures['valid']} of {figures['attempts']} valid")


if __name__ == "__main__":
    run_as_program(main)
