"""vLLM's part of :mod:`benchmarks.critic_quality.speed`, for the interpreter of vLLM's environment.

The reference is one request for the whole critique: the engine masks each token by the critique's grammar, in which
what is copied is literal text, and takes the likeliest one, one token a pass. The mask lets it write literal text in
other tokens than the tokenizer would; its speed is that of the tokens that it writes.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepalign.types import CritiqueRequest
from stepalign_critic.backends.base import Alignment, RenderedPrompt
from stepalign_critic.backends.vllm import VllmBackend
from stepalign_critic.decoding.bounds import cut_by_tokens
from stepalign_critic.decoding.grammar import Grammar, Literal, Sequenced, to_lark
from stepalign_critic.decoding.plan import Plan, Score
from stepalign_critic.service import AlignedDecoding, CriticService
from stepalign_run.config import CriticServerSection

PROMPTS = "chat-v1"
BUDGET = 1024


class _Engine(VllmBackend):
    """The backend, and the reference in the same engine."""

    async def read(self, token_ids: list[int]) -> None:
        """Bring a prompt into the prefix cache."""
        await self._complete(token_ids, max_tokens=1)

    async def whole(self, token_ids: list[int], plan: Plan, p_wrong: Sequence[float]) -> tuple[str, int]:
        """The critique in one masked request, its place of error given; and how many tokens the request wrote."""
        from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

        assert self._drafts is not None
        choosing = plan.choose(_scores(plan, p_wrong))
        remainder = plan.remainder(choosing.place, self._drafts.drafts.count)
        copied = "".join([*(piece.text for piece in plan.pieces[: remainder.kept]), *remainder.given])
        parts: list[Grammar] = [Literal(copied)] if copied else []
        parts += [] if remainder.grammar is None else [remainder.grammar]
        output = await self._complete(
            token_ids,
            max_tokens=self._section.max_new_tokens,
            structured_outputs=StructuredOutputsParams(grammar=to_lark(Sequenced(tuple(parts)))),
        )
        written = "" if remainder.grammar is None else remainder.open_text + output.text.removeprefix(copied)
        return plan.finish(choosing, written, cut_by_tokens(written)).text, len(output.token_ids)


def _scores(plan: Plan, p_wrong: Sequence[float]) -> list[Score]:
    """Scores of an inline draft that say these probabilities."""
    scores: list[Score] = []
    told = set[int]()
    for piece in plan.pieces:
        if piece.step is not None:
            scores.append(Score(0.0 if piece.step in told else math.log1p(-min(p_wrong[piece.step], 1 - 1e-12))))
            told.add(piece.step)
    return scores


async def _measure(path: Path, requests: Sequence[CritiqueRequest]) -> dict[str, Any]:
    section = CriticServerSection.model_validate(
        {
            "backend": "vllm",
            "path": path,
            "prompts": PROMPTS,
            "max_prompt_tokens": 3072,
            "max_new_tokens": BUDGET,
            "max_batch": 8,
            "vllm": {"gpu_memory_utilization": 0.3, "engine_args": {"enforce_eager": True}},
        }
    )
    engine = _Engine(section)
    service = CriticService(engine, PROMPTS, aligned=AlignedDecoding(BUDGET))
    await engine.start()
    try:
        await _ours(engine, service, requests[0])
        tokens = reference_tokens = same = 0
        seconds = reference_seconds = 0.0
        for index, request in enumerate(requests):
            # Whoever comes second finds the prompt in the prefix cache: both read it before the clock starts.
            plan, messages = service.plan(request)
            prompt = engine.render(messages)
            await engine.read(prompt)
            began = time.perf_counter()
            made = await _ours(engine, service, request)
            taken = time.perf_counter() - began
            assert made.p_wrong is not None
            began = time.perf_counter()
            text, written = await engine.whole(prompt, plan, made.p_wrong)
            reference_seconds += time.perf_counter() - began
            seconds += taken
            tokens += made.completion_tokens
            reference_tokens += written
            same += text == made.text
            print(index, made.completion_tokens, round(taken, 2), written, text == made.text, flush=True)
    finally:
        await engine.stop()
    speed, reference = tokens / seconds, reference_tokens / reference_seconds
    return {
        "attempts": len(requests),
        "tokens": tokens,
        "seconds": seconds,
        "reference_tokens": reference_tokens,
        "reference_seconds": reference_seconds,
        "speedup": speed / reference,
        "differing": len(requests) - same,
    }


async def _ours(engine: _Engine, service: CriticService, request: CritiqueRequest) -> Alignment:
    plan, messages = service.plan(request)
    return await engine.align(RenderedPrompt(request, messages, engine.render(messages)), plan)


def main() -> None:
    """Arguments: the model's folder, a file of requests, and the file for the figures."""
    path, asked, answered = map(Path, sys.argv[1:])
    requests = [CritiqueRequest.model_validate(each) for each in json.loads(asked.read_text(encoding="utf-8"))]
    answered.write_text(json.dumps(asyncio.run(_measure(path, requests))), encoding="utf-8")


if __name__ == "__main__":
    main()
