"""What copying costs: aligned decoding beside masked greedy decoding of one token a pass.

Prompt set ``chat-v1``, in which the critique is written out with all its copies; attempts of 150 tokens and more, with
reference solution and known answer; float32. Both sides have the same model, prompt, grammar and place of the error,
and forced text counts as the tokenizer writes it. Speed is tokens of critiques over seconds, the reading of the prompt
included; ``without_prompt`` leaves that out.

With transformers the reference is a loop of its own: the prompt in one pass, then one token a pass, what is copied or
certain too. A critique that parts from it counts under ``ties`` where the two best allowed logits differ by less than
1e-3, else under ``differing``; at batch 8, too. With vLLM it is a request of the whole critique under its grammar
(:mod:`benchmarks.critic_quality.speed_vllm`, in vLLM's own environment).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.arms_benchmark import ROOT
from benchmarks.critic.processes import end_of_log, temporary_folder
from benchmarks.critic_quality.cells import of_half
from benchmarks.critic_quality.critics import VLLM_ENVIRONMENT, model_folder, vllm_python
from benchmarks.errors import BenchError
from stepalign.prompts import render_token_ids
from stepalign.types import CritiqueRequest
from stepalign_critic.backends import create_backend
from stepalign_critic.decoding.draft import DraftTokens
from stepalign_critic.decoding.drafted import Decoded, DraftedDecoder, Job
from stepalign_critic.decoding.plan import Choosing
from stepalign_critic.decoding.tokens import GrammarTokens
from stepalign_critic.service import AlignedDecoding, CriticService
from stepalign_models.caches import cache_parameter
from stepalign_run.config import CriticServerSection
from stepalign_run.data import LabelledData

MODEL = "qwen-0.5b"
PROMPTS = "chat-v1"
LEAST_TOKENS = 150
BUDGET = 1024
SMALLEST_MARGIN = 1e-3
BATCH = 8


def attempts(data: LabelledData, count: int) -> list[CritiqueRequest]:
    """Requests for the first ``count`` long attempts of the test half."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder(MODEL))
    long = [
        solution
        for solution in of_half(data, "test")
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


@dataclass(frozen=True)
class _Plain:
    """A critique of the reference. ``prompt_seconds`` of its seconds went into the prompt."""

    tokens: list[int]
    seconds: float
    prompt_seconds: float


class _Decoders:
    """Aligned decoding and the reference, over one model."""

    def __init__(self) -> None:
        folder = model_folder(MODEL)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        section = CriticServerSection(path=folder, prompts=PROMPTS)
        self._service = CriticService(create_backend(section), PROMPTS, aligned=AlignedDecoding(BUDGET))
        self._drafts = DraftTokens(self._tokenizer, {})
        eos = (self._tokenizer.eos_token_id,)
        self._grammars = GrammarTokens(self._tokenizer, eos, self._model.config.vocab_size)
        self._aligned = DraftedDecoder(self._model, self._drafts, self._grammars, eos[0])

    def job(self, request: CritiqueRequest) -> Job:
        plan, messages = self._service.plan(request)
        return Job(plan, self._drafts.draft(plan, render_token_ids(self._tokenizer, messages)))

    def aligned(self, requests: Sequence[CritiqueRequest]) -> tuple[list[Decoded], float]:
        """The critiques of one batch, and its seconds."""
        jobs = [self.job(request) for request in requests]
        began = time.perf_counter()
        results = self._aligned.decode(jobs, lambda _: True)
        seconds = time.perf_counter() - began
        failed = [result for result in results if not isinstance(result, Decoded)]
        if failed:
            raise BenchError(f"a critique failed: {failed[0]}")
        return [result for result in results if isinstance(result, Decoded)], seconds

    def reference(self, request: CritiqueRequest, choosing: Choosing) -> _Plain:
        """The critique whose place of error is known, its prompt in one pass and then one token a pass."""
        job = self.job(request)
        began = time.perf_counter()
        remainder = job.plan.remainder(choosing.place, self._drafts.count)
        answer = self._drafts.answer(job.plan, job.draft, remainder)
        cache = DynamicCache(config=self._model.config)
        logits = self._pass(job.draft.ids[: job.draft.prompt], cache)
        prompt_seconds = time.perf_counter() - began
        for token in answer:
            logits = self._pass([token], cache)
        tokens = list(answer)
        matcher = None if remainder.grammar is None else self._grammars.matcher(remainder.grammar)
        while matcher is not None:
            forced = self._grammars.forced(matcher)
            for token in forced:
                logits = self._pass([token], cache)
            tokens += forced
            if matcher.is_stopped():
                break
            tokens.append(self._grammars.best(matcher, logits))
            if matcher.is_stopped():
                break
            logits = self._pass(tokens[-1:], cache)
        return _Plain(tokens, time.perf_counter() - began, prompt_seconds)

    def margin(self, request: CritiqueRequest, choosing: Choosing, tokens: list[int], at: int) -> float:
        """By how much the best allowed logit leads the second one after ``at`` tokens of a critique."""
        job = self.job(request)
        remainder = job.plan.remainder(choosing.place, self._drafts.count)
        answer = self._drafts.answer(job.plan, job.draft, remainder)
        if remainder.grammar is None or at < len(answer):
            return float("inf")
        matcher = self._grammars.matcher(remainder.grammar)
        matcher.consume_tokens(tokens[len(answer) : at])
        logits = self._pass([*job.draft.ids[: job.draft.prompt], *tokens[:at]], DynamicCache(config=self._model.config))
        ordered = logits.argsort(descending=True).tolist()
        allowed = (token for token in ordered if matcher.validate_tokens([token]) == 1)
        first, second = next(allowed), next(allowed, None)
        return float("inf") if second is None else float(logits[first] - logits[second])

    def _pass(self, ids: list[int], cache: DynamicCache) -> torch.Tensor:
        named: dict[str, Any] = {cache_parameter(self._model): cache}
        with torch.inference_mode():
            return self._model(input_ids=torch.tensor([ids]), logits_to_keep=1, **named).logits[0, -1]


def transformers_speed(requests: Sequence[CritiqueRequest]) -> dict[str, Any]:
    """Both by turns at batch 1, then aligned decoding at batch 8, whose tokens must be the reference's too."""
    decoders = _Decoders()
    decoders.aligned(requests[:1])
    alone: list[Decoded] = []
    plain: list[_Plain] = []
    seconds = 0.0
    for request in requests:
        (found,), taken = decoders.aligned([request])
        seconds += taken
        alone.append(found)
        plain.append(decoders.reference(request, found.choosing))
    together: list[Decoded] = []
    batch_seconds = 0.0
    for start in range(0, len(requests), BATCH):
        results, taken = decoders.aligned(requests[start : start + BATCH])
        together += results
        batch_seconds += taken
    tokens = sum(len(found.tokens) for found in alone)
    reference = sum(each.seconds for each in plain)
    prompts = sum(each.prompt_seconds for each in plain)
    return {
        "attempts": len(requests),
        "written_by_model": sum(found.choosing.place is not None for found in alone),
        "tokens": tokens,
        "seconds": seconds,
        "reference_seconds": reference,
        "prompt_seconds": prompts,
        "speedup": reference / seconds,
        "speedup_without_prompt": (reference - prompts) / (seconds - prompts),
        "by_attempt": [
            {"tokens": len(each.tokens), "reference_seconds": each.seconds, "copies_all": found.choosing.place is None}
            for found, each in zip(alone, plain, strict=True)
        ],
        **_identity(decoders, requests, alone, plain),
        "batch_8": {
            "seconds": batch_seconds,
            "tokens_per_second": sum(len(found.tokens) for found in together) / batch_seconds,
            **_identity(decoders, requests, together, plain),
        },
    }


def _identity(
    decoders: _Decoders, requests: Sequence[CritiqueRequest], found: Sequence[Decoded], plain: Sequence[_Plain]
) -> dict[str, int]:
    """How many critiques differ from the reference's, and how many part from it where two tokens are as good."""
    differing = ties = 0
    for request, ours, theirs in zip(requests, found, plain, strict=True):
        if ours.tokens == theirs.tokens:
            continue
        pairs = zip(ours.tokens, theirs.tokens, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        is_tie = at is not None and decoders.margin(request, ours.choosing, theirs.tokens, at) < SMALLEST_MARGIN
        ties, differing = ties + is_tie, differing + (not is_tie)
    return {"ties": ties, "differing": differing}


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
    """Both engines, on ``count`` attempts."""
    requests = attempts(data, count)
    return {
        "sample": {"least_tokens": LEAST_TOKENS, "model": MODEL, "prompts": PROMPTS},
        "transformers": transformers_speed(requests),
        "vllm": vllm_speed(requests),
    }
