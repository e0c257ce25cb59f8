"""llama.cpp's server in this process, from the wheels of ``xllamacpp``: OpenAI's protocol before a GGUF file.

docs/openai-servers.md says what it takes and how it answers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepalign.errors import ConfigError

DEFAULT_THREADS = max(1, (os.cpu_count() or 2) - 1)
"""All cores but one. llama.cpp's threads spin while they wait, so with one too many every token takes many times as
long."""
DEFAULT_CONTEXT = 8192
"""Tokens of prompt and answer; the two prompts of a critique take up to 2,000 without the request and the answer."""
_ERRORS_ONLY = 1
_PROMPT_CACHE_MIB = 1024
"""Memory for earlier prompts. A critic alternates between two, each with long examples in front."""


@dataclass(frozen=True)
class LlamaServer:
    """A server that runs until :func:`start_llama_server`'s process ends."""

    url: str
    """Its address, ``/v1`` included."""
    model: str
    """The name under which it lists the model."""
    engine: Any
    """The object that holds it."""


def start_llama_server(
    model: Path, *, port: int = 0, threads: int = DEFAULT_THREADS, context: int = DEFAULT_CONTEXT, verbose: bool = False
) -> LlamaServer:
    """Load a GGUF file and listen on the loopback address; port 0 takes a free one. Returns when it can be asked.

    It answers one request at a time, so that all of them share what is cached of their prompts, and lists the model
    under the file's name in lower case, without ``.gguf``. Raises ConfigError when there is no such file and when
    llama.cpp does not start; its own words are on standard error then.
    """
    if not model.is_file():
        raise ConfigError(f"{model} is no file: `stepalign lab qwen` downloads one")
    # Its names come from an extension module without types.
    import xllamacpp as untyped  # pyright: ignore[reportMissingImports]

    xllamacpp: Any = untyped
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.model_alias = {model.stem.lower()}
    settings.port = port
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.cache_ram_mib = _PROMPT_CACHE_MIB
    settings.ui = False
    if not verbose:
        settings.verbosity = _ERRORS_ONLY
    try:
        engine = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise ConfigError(f"llama.cpp does not serve {model} on port {port}; its words are above ({error})") from None
    return LlamaServer(f"{engine.listening_address}/v1", model.stem.lower(), engine)
