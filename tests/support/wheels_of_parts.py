"""Wheels that carry a file in parts: an index on disk, or a folder of what has been downloaded."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from stepalign_lab.parts import FileInParts


def part_name(file: FileInParts, number: int) -> str:
    return f"{file.distribution}{number}".replace("-", "_")


def write_wheel(index: Path, file: FileInParts, number: int, members: dict[str, bytes]) -> Path:
    """A wheel that pip takes, with ``members`` beside its metadata."""
    name = part_name(file, number)
    about = f"{name}-{file.version}.dist-info"
    path = index / f"{name}-{file.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for inner, content in members.items():
            wheel.writestr(inner, content)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {file.version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return path


def write_index(index: Path, file: FileInParts, content: bytes) -> None:
    """All wheels of ``file``, with ``content`` cut into equal parts."""
    index.mkdir(parents=True, exist_ok=True)
    length = -(-len(content) // file.count)
    for number in range(1, file.count + 1):
        piece = content[(number - 1) * length : number * length]
        name = part_name(file, number)
        write_wheel(index, file, number, {f"{name}/__init__.py": b"", f"{name}/data/part{number:02}.bin": piece})


def small_file(content: bytes, count: int = 3) -> FileInParts:
    return FileInParts("small.gguf", len(content), hashlib.sha256(content).hexdigest(), "small-part", "1.0", count)
