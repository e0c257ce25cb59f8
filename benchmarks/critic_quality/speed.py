"""What copying costs: aligned decoding beside masked greedy decoding of one token a pass.

Prompt set ``chat-v1``, in which the critique is written out with all its copies; attempts of 150 tokens and more, with
reference solution and known answer; float32. Both sides have the same model, prompt, grammar and place of the error,
and forced text counts as the tokenizer writes it. Speed is tokens of critiques over seconds, the reading of the prompt
included; ``without_prompt`` leaves that out.

With transformers the reference is the same decoder without drafts. A token that differs counts as ``ties`` when the
two best allowed logits before it differ by less than 1e-3, else as ``differing``. With vLLM it is a request of the
whole critique under its grammar (:mod:`benchmarks.critic_quality.speed_vllm`, in vLLM's own environment).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.arms_benchmark import ROOT
from benchmarks.critic.processes import end_of_log, temporary_folder
from benchmarks.critic_quality.cells import of_test_half
from benchmarks.critic_quality.critics import VLLM_ENVIRONMENT, model_folder, vllm_python
from benchmarks.errors import BenchError
from stepalign.prompts import render_token_ids
from stepalign.types import CritiqueRequest
from stepalign_critic.backends import create_backend
from stepalign_critic.decoding.draft import DraftTokens
from stepalign_critic.decoding.drafted import Decoded, DraftedDecoder, Job
from stepalign_critic.decoding.tokens import GrammarTokens
from stepalign_critic.service import AlignedDecoding, CriticService
from stepalign_run.config import CriticServerSection
from stepalign_run.data import LabelledData

MODEL = "qwen-0.5b"
PROMPTS = "chat-v1"
LEAST_TOKENS = 150
BUDGET = 1024
SMALLEST_MARGIN = 1e-3
BATCH = 8


@dataclass(frozen=True)
class Speed:
    """``tokens`` of all critiques; ``seconds`` of aligned decoding and of the reference."""

    attempts: int
    tokens: int
    seconds: float
    reference_seconds: float
    speedup: float
    speedup_without_prompt: float | None
    ties: int
    differing: int


def attempts(data: LabelledData, count: int) -> list[CritiqueRequest]:
    """Requests for the first ``count`` long attempts of the test half."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder(MODEL))
    long = [
        solution
        for solution in of_test_half(data)
        if len(tokenizer("\n".join(solution.steps), add_special_tokens=False)["input_ids"]) >= LEAST_TOKENS
    ]
    return [
        CritiqueRequest(
            question=each.question,
            steps=list(each.steps),
            reference_solution=each.reference_solution,
            answer=each.answer,
        )
        for each in long[:count]
    ]


class _Decoders:
    """The decoder with drafts and without, over one model."""

    def __init__(self) -> None:
        folder = model_folder(MODEL)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        section = CriticServerSection(path=folder, prompts=PROMPTS)
        self._service = CriticService(create_backend(section), PROMPTS, aligned=AlignedDecoding(BUDGET))
        self._drafts = DraftTokens(self._tokenizer, {})
        eos = (self._tokenizer.eos_token_id,)
        self._grammars = GrammarTokens(self._tokenizer, eos, self._model.config.vocab_size)
        self._of = {
            plain: DraftedDecoder(self._model, self._drafts, self._grammars, eos[0], plain=plain)
            for plain in (False, True)
        }

    def jobs(self, requests: Sequence[CritiqueRequest]) -> list[Job]:
        planned = [self._service.plan(request) for request in requests]
        return [
            Job(plan, self._drafts.draft(plan, render_token_ids(self._tokenizer, messages)))
            for plan, messages in planned
        ]

    def decode(self, requests: Sequence[CritiqueRequest], *, plain: bool) -> tuple[list[list[int]], float]:
        """The tokens of the critiques of one batch, and its seconds."""
        jobs = self.jobs(requests)
        began = time.perf_counter()
        results = self._of[plain].decode(jobs, lambda _: True)
        seconds = time.perf_counter() - began
        tokens: list[list[int]] = []
        for result in results:
            if not isinstance(result, Decoded):
                raise BenchError(f"a critique failed: {result}")
            tokens.append(result.tokens)
        return tokens, seconds

    def prompt_seconds(self, requests: Sequence[CritiqueRequest]) -> float:
        """How long the prompts take to read, one after the other."""
        total = 0.0
        for job in self.jobs(requests):
            began = time.perf_counter()
            with torch.inference_mode():
                self._model(input_ids=torch.tensor([job.draft.ids[: job.draft.prompt]]), logits_to_keep=1)
            total += time.perf_counter() - began
        return total

    def margin(self, request: CritiqueRequest, tokens: Sequence[int], others: Sequence[int]) -> float:
        """By how much the logits of two answers differ where they part."""
        (job,) = self.jobs([request])
        at = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), None)
        if at is None:
            return float("inf")
        ids = job.draft.ids[: job.draft.prompt] + list(tokens[:at])
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
        return abs(float(logits[tokens[at]] - logits[others[at]]))


def transformers_speed(requests: Sequence[CritiqueRequest], batch: int) -> Speed:
    """Both decoders by turns, ``batch`` attempts at a time."""
    decoders = _Decoders()
    decoders.decode(requests[:1], plain=False)
    tokens = differing = ties = 0
    seconds = {False: 0.0, True: 0.0}
    for start in range(0, len(requests), batch):
        group = requests[start : start + batch]
        found: dict[bool, list[list[int]]] = {}
        for plain in (False, True) if start // batch % 2 else (True, False):
            found[plain], taken = decoders.decode(group, plain=plain)
            seconds[plain] += taken
        tokens += sum(map(len, found[False]))
        for request, ours, theirs in zip(group, found[False], found[True], strict=True):
            if ours != theirs:
                is_tie = decoders.margin(request, ours, theirs) < SMALLEST_MARGIN
                ties, differing = ties + is_tie, differing + (not is_tie)
    prompts = decoders.prompt_seconds(requests) if batch == 1 else None
    return Speed(
        attempts=len(requests),
        tokens=tokens,
        seconds=seconds[False],
        reference_seconds=seconds[True],
        speedup=seconds[True] / seconds[False],
        speedup_without_prompt=(None if prompts is None else (seconds[True] - prompts) / (seconds[False] - prompts)),
        ties=ties,
        differing=differing,
    )


def vllm_speed(requests: Sequence[CritiqueRequest]) -> dict[str, Any]:
    """The figures of :mod:`benchmarks.critic_quality.speed_vllm`. Raises BenchError when it fails."""
    with temporary_folder("speed-vllm") as folder:
        asked, answered = folder / "requests.json", folder / "figures.json"
        asked.write_text(json.dumps([request.model_dump(mode="json") for request in requests]), encoding="utf-8")
        command = [vllm_python(), "-m", "benchmarks.critic_quality.speed_vllm"]
        command += [str(model_folder(MODEL)), str(asked), str(answered)]
        with (folder / "log").open("wb") as log:
            environment = {**os.environ, **VLLM_ENVIRONMENT}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
        if done.returncode:
            raise BenchError(f"vLLM's part failed:\n{end_of_log(folder)}")
        return json.loads(answered.read_text(encoding="utf-8"))


def measure_speed(data: LabelledData, count: int) -> dict[str, Any]:
    """All of it, at batch 1 and, with transformers, at batch 8."""
    requests = attempts(data, count)
    return {
        "attempts": {"count": len(requests), "least_tokens": LEAST_TOKENS, "model": MODEL, "prompts": PROMPTS},
        "transformers": asdict(transformers_speed(requests, 1)),
        "transformers_batch_8": asdict(transformers_speed(requests, BATCH)),
        "vllm": vllm_speed(requests),
    }
