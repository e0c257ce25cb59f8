"""The extra that a missing module comes with.

A command names one extra that brings all its modules, so that a user installs once and not module by module. Modules
that only some backends of the critic need are named by the backend.
"""

from __future__ import annotations

EXTRA_OF_COMMAND = {
    "critique": "cli",
    "queue": "queue",
    "critic": "critic",
    "critic-quality": "report",
    **dict.fromkeys(["solver", "evaluate", "band"], "solver"),
    **dict.fromkeys(["trainer", "probe-worker"], "trainer"),
    **dict.fromkeys(["run", "demo", "probe", "probe-report", "report", "compare", "lab"], "lab"),
}

# The smallest extra that brings a module.
EXTRA_OF_MODULE = {
    **dict.fromkeys(["rich", "typer"], "cli"),
    **dict.fromkeys(["pydantic_settings", "redis", "structlog"], "queue"),
    **dict.fromkeys(["fastapi", "prometheus_client", "starlette", "uvicorn"], "critic"),
    **dict.fromkeys(["jinja2", "numpy", "safetensors", "tokenizers", "torch", "transformers"], "models"),
    **dict.fromkeys(["aiohttp", "httpx_aiohttp"], "critic-openai"),
    "datasets": "hub",
    **dict.fromkeys(["latex2sympy2_extended", "math_verify"], "math"),
    **{"peft": "trainer", "gguf": "lab", "vllm": "critic-vllm", "xllamacpp": "llama-cpp"},
}
# No command's extra brings these: one command of a group needs them.
_OF_THEIR_OWN = {"llama-cpp"}

_BACKENDS = {"models": "critic-transformers", "critic-openai": "critic-openai", "critic-vllm": "critic-vllm"}


def extra_for(module: str | None, command: str | None) -> str | None:
    """The extra to install when ``command`` misses ``module``; None for a module that no extra brings."""
    smallest = EXTRA_OF_MODULE.get(module or "")
    if smallest is None or smallest in _OF_THEIR_OWN:
        return smallest
    if command == "critic":
        return _BACKENDS.get(smallest, "critic")
    return EXTRA_OF_COMMAND.get(command or "", smallest)


def how_to_install(extra: str) -> str:
    """The command that installs an extra, for the end of a message."""
    return f"pip install 'stepalign[{extra}]'"
