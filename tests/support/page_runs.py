"""Folders of finished runs, as the processes leave them, with figures like those of the lab."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from stepalign_lab.domain import FACTS, Chain, apply, reference_solution, sample_chain, tagged, word_fact, wrong_facts

PROBLEMS, SAMPLES, EVERY, BATCH = 60, 12, 10, 32
# Shares right and trace@k at the end, and the step at which half of it is learned.
ARMS: dict[str, tuple[float, float, int]] = {
    "stepalign_scoped": (0.95, 0.92, 24),
    "stepalign": (0.24, 0.05, 60),
    "refsol": (0.13, 0.01, 30),
    "grpo": (0.18, 0.05, 80),
    "shuffled": (0.10, 0.0, 15),
}
CRITIQUED = ("stepalign_scoped", "stepalign", "shuffled")
WRONG = wrong_facts(0)


def write_run(folder: Path, arm: str = "stepalign_scoped", seed: int = 0, **changes: Any) -> Path:
    """One run's folder. ``changes``: ``steps``, ``name``, ``tokens`` (rows, or False for no file), ``alarms``."""
    steps, name = changes.get("steps", 100), changes.get("name", f"{arm}-{seed}")
    rng = random.Random(f"{arm} {seed} {steps}")
    updates = [_update(rng, arm, step, steps) for step in range(1, steps + 1)]
    folder.mkdir(parents=True)
    _write_rows(folder / "metrics.jsonl", updates)
    _write_rows(folder / "evaluation.jsonl", [])
    report = _report(rng, arm, seed, name, updates)
    report["alarms"] = changes.get("alarms", {})
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    tokens = changes.get("tokens", True)
    if tokens is not False:
        _write_rows(folder / "tokens.jsonl", token_rows(rng, arm, steps) if tokens is True else tokens)
    return folder


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _learned(arm: str, step: int) -> tuple[float, float]:
    right, trace, half = ARMS.get(arm, ARMS["shuffled"])
    share = 1 / (1 + 2.718 ** (-(step - half) / (half / 5))) if step else 0.0
    return 0.001 + right * share, trace * share


def _update(rng: random.Random, arm: str, step: int, steps: int) -> dict[str, Any]:
    done = _learned(arm, step)[0] / ARMS.get(arm, ARMS["shuffled"])[0]
    critiqued = arm in CRITIQUED
    critiques: Counter[str] = Counter()
    for _ in range(BATCH if critiqued else 0):
        outcomes = ("incorrect", "correct", "incomplete", "copied_step_altered", "unparseable")
        critiques[rng.choices(outcomes, (0.93 - 0.85 * done, 0.02 + 0.85 * done, 0.02, 0.02, 0.01))[0]] += 1
    refused = {k: critiques[k] for k in ("copied_step_altered", "unparseable") if critiques[k]}
    trained = BATCH - sum(refused.values())
    row: dict[str, Any] = {
        "step": step,
        "rollouts": BATCH,
        "loss": (0.45 * (1 - done) + 0.03) * rng.uniform(0.85, 1.15),
        "kl_all_tokens": (0.9 * (1 - done) + 0.05) * rng.uniform(0.9, 1.1),
        "advantage_correct": (0.0 if critiqued else -0.05) + rng.gauss(0, 0.004) if arm != "grpo" else None,
        "advantage_correct_below": 0.0 if critiqued else rng.uniform(0.06, 0.1),
        "advantage_at_error": -12 + 8 * done + rng.gauss(0, 0.5) if arm != "grpo" else None,
        "advantage_after_error": -3.0 if arm == "stepalign" else None,
        "first_token_kl": 1e-5,
        "entropy": 0.03 + 0.12 * done * (1 - done) + rng.uniform(0, 0.01),
        "mean_tokens": 38.4 + rng.gauss(0, 0.6),
        "truncated": max(0.0, rng.gauss(0.0, 0.01)),
        "grad_norm": (1.1 * (1 - done) + 0.1) * rng.uniform(0.7, 1.4),
        "trained_rollouts": trained,
        "tokens": 1228,
        "tokens_in_scope": 700,
        "signal_share": 0.08 * (1 - done) + 0.01,
        "update_seconds": 0.17,
        "tokens_per_second": 7000.0,
        "outcomes": {"trained": trained, **{f"skipped:critique_{k}": n for k, n in refused.items()}},
        "critiques": dict(sorted(critiques.items())),
        "alarms": [],
    }
    if arm == "grpo":
        row |= {"reward_mean": done * 0.2, "groups_without_signal": 3, "clip_fraction": 0.0, "kl_to_base": 0.1 * done}
    return row


def _figures_of(update: dict[str, Any]) -> dict[str, Any]:
    kinds = ("correct", "correct_below", "at_error", "after_error")
    return {key: update[key] for key in ("loss", *(f"advantage_{kind}" for kind in kinds))}


def _marks(rng: random.Random, right: float, trace: float) -> dict[str, Any]:
    ease = [rng.betavariate(1.2, 1.2) * 2 for _ in range(PROBLEMS)]
    correct = [sum(rng.random() < min(0.99, right * each) for _ in range(SAMPLES)) for each in ease]
    share = trace / right if right else 0.0
    return {
        "correct": correct,
        "graded": [SAMPLES] * PROBLEMS,
        "majority": [1.0 if count > 6 else 0.5 if count == 6 else 0.0 for count in correct],
        "trace_correct": [sum(rng.random() < share for _ in range(count)) for count in correct],
    }


def _figures(marks: dict[str, Any]) -> dict[str, Any]:
    k, n = SAMPLES, PROBLEMS
    return {
        f"avg_at_{k}": round(100 * sum(marks["correct"]) / (k * n), 4),
        f"maj_at_{k}": round(100 * sum(marks["majority"]) / n, 4),
        f"pass_at_{k}": round(100 * sum(count > 0 for count in marks["correct"]) / n, 4),
        f"trace_at_{k}": round(100 * sum(marks["trace_correct"]) / (k * n), 4),
        "mean_tokens": 38.4,
        "format_rate": 99.0,
        "truncated": 0.0,
        "grader_errors": 0,
        "problems": n,
        "samples": k,
    }


def _report(rng: random.Random, arm: str, seed: int, name: str, updates: list[dict[str, Any]]) -> dict[str, Any]:
    steps = len(updates)
    validation = {step: _marks(rng, *_learned(arm, step)) for step in range(0, steps + 1, EVERY)}
    selected = max(validation, key=lambda step: (sum(validation[step]["correct"]), -step))
    test, base = _marks(rng, *_learned(arm, selected)), _marks(random.Random(f"base {seed}"), 0.001, 0.0)
    ids = {split: [f"lab-{split}-{index:03}" for index in range(PROBLEMS)] for split in ("validation", "test")}
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for row in updates:
        counts.update(row["critiques"])
        skipped.update({k.removeprefix("skipped:"): n for k, n in row["outcomes"].items() if k != "trained"})
    return {
        "run": name,
        "seed": seed,
        "steps": steps,
        "arms": {
            arm: {
                "objective": "grpo" if arm == "grpo" else "forward_kl",
                "context": {"refsol": "reference", "grpo": "null"}.get(arm, "critique"),
                "scope": "through_first_error" if arm == "stepalign_scoped" else "full",
                "condition": {"scope": "through_first_error" if arm == "stepalign_scoped" else "full"},
                "first_update": _figures_of(updates[0]),
                "last_update": _figures_of(updates[-1]),
                "validation": {str(step): _figures(marks) for step, marks in validation.items()},
                "selected_step": selected,
                "test": _figures(test),
            }
        },
        "base": {"test": _figures(base), "validation": _figures(validation[0])},
        "chance": {"avg_at_12": 10.0, "maj_at_12": 10.0, "pass_at_12": 71.757},
        "by_problem": {
            "ids": ids,
            "base": {"test": base, "validation": validation[0]},
            "validation": {str(step): marks for step, marks in validation.items()},
            "test": test,
        },
        "terms": {
            "base": "5d41402abc4b2a76b9719d911017c592",
            "evaluation": {"temperature": 1.0, "max_new_tokens": 64, "samples": SAMPLES, "every": EVERY},
            "batch": BATCH,
            "steps": steps,
        },
        "rollouts": {
            "published": steps * BATCH,
            "trained": steps * BATCH - sum(skipped.values()),
            "skipped": dict(sorted(skipped.items())),
            "stale": 0,
            "dead": 0,
            "pending": 0,
        },
        "critiques": dict(sorted(counts.items())),
        "evaluation": {"temperature": 1.0, "max_new_tokens": 64},
        "alarms": {},
        "config": {},
        "threads": 1,
        "wall_seconds": 207.4,
        "versions": {"python": "3.12.4", "stepalign": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
    }


def token_rows(rng: random.Random, arm: str, steps: int) -> list[dict[str, Any]]:
    """Six rollouts of the first and of the last update."""
    return [_token_row(rng, arm, step, index) for step in (1, steps) for index in range(6)]


def _token_row(rng: random.Random, arm: str, step: int, index: int) -> dict[str, Any]:
    wrong = step == 1 or index % 3 == 0
    table = {fact: apply(*fact) for fact in FACTS} | (WRONG if wrong else {})
    chain = sample_chain(rng)
    results = chain.results(table)
    tokens = [*_tokens(tagged(_bodies(chain, results), results[-1])), ""]
    error = _first_error(tokens, chain, results)
    in_scope = len(tokens)
    if error is not None and arm == "stepalign_scoped":
        in_scope = next(at for at in range(error, len(tokens)) if tokens[at].startswith((" </", "</"))) + 1
    return {
        "step": step,
        "rollout_id": f"v{step - 1:06}/chain-{index}/0",
        "problem": {
            "id": f"chain-{index}",
            "question": chain.question,
            "answer": str(chain.results()[-1]),
            "reference_solution": reference_solution(chain),
        },
        "verdict": None if arm not in CRITIQUED else "correct" if error is None else "incorrect",
        "correct": results[-1] == chain.results()[-1],
        "finish_reason": "stop",
        "first_error_token": error,
        "in_scope": in_scope,
        "tokens": tokens,
        "logprob": [-abs(rng.gauss(0, 0.01)) for _ in tokens],
        "contexts": {
            "critique": _context(rng, tokens, error, tagged(_bodies(chain, chain.results()), chain.results()[-1]), 0.0),
            "reference": _context(rng, tokens, error, reference_solution(chain), 0.09),
        },
    }


def _bodies(chain: Chain, results: list[int]) -> list[str]:
    befores = [chain.start, *results]
    return [
        word_fact(before, op, b, result, "own")
        for before, (op, b), result in zip(befores, chain.operations, results, strict=False)
    ]


def _tokens(text: str) -> list[str]:
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]


def _first_error(tokens: list[str], chain: Chain, results: list[int]) -> int | None:
    right = _tokens(tagged(_bodies(chain, chain.results()), chain.results()[-1]))
    return next((at for at, (mine, true) in enumerate(zip(tokens, right, strict=False)) if mine != true), None)


def _context(rng: random.Random, tokens: list[str], error: int | None, text: str, disturbed: float) -> dict[str, Any]:
    """Near zero along the correct prefix, −12 at the error, unsettled after it; ``disturbed`` share of −1 to −5."""
    advantage: list[float] = []
    for at in range(len(tokens)):
        value = rng.gauss(0, 0.01) - (0.05 if disturbed else 0.0)
        if disturbed and rng.random() < disturbed:
            value = -rng.uniform(1, 5)
        if error is not None and at == error:
            value = -12 + rng.gauss(0, 0.4)
        elif error is not None and at > error and rng.random() < 0.35:
            value = rng.choice([-rng.uniform(4, 9), rng.uniform(0, 1.5)])
        advantage.append(value)
    return {"text": text, "advantage": advantage, "kl": [abs(value) * 0.97 + 1e-4 for value in advantage]}
