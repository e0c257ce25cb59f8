"""A model in a GGUF file as a safetensors folder.

transformers reads GGUF, but the loaded model counts as quantized and refuses ``save_pretrained``. So its dequantized
weights are copied into a fresh model of the same configuration. The tokenizer and the chat template are the file's.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from stepalign_run.folder.outputs import prepare_new_folder

if TYPE_CHECKING:
    import torch


def is_converted(target: Path) -> bool:
    """Whether a conversion to ``target`` has ended: it appears whole or not at all."""
    return (target / "config.json").is_file()


def convert_gguf(source: Path, target: Path, dtype: torch.dtype, further_ends: tuple[str, ...] = ()) -> None:
    """Write ``source`` as safetensors in ``dtype`` to the new folder ``target``.

    A generation ends with the tokenizer's end token and with each of ``further_ends``. Memory: twice the folder's size.
    Raises NotOursError when anything but an empty folder is there.
    """
    prepare_new_folder(target)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)
    config = loaded.config
    vars(config).pop("quantization_config", None)
    fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    ends = [tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, further_ends)]
    fresh.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends if further_ends else tokenizer.eos_token_id,
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
