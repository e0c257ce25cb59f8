"""The rule for ``device = "auto"``, in one place for every process. No torch here: the caller says what it sees."""

from __future__ import annotations


def choose_device(name: str, *, cuda: bool, mps: bool) -> str:
    """``auto`` takes CUDA, then MPS, then CPU; any other name is taken as it is."""
    if name != "auto":
        return name
    if cuda:
        return "cuda"
    return "mps" if mps else "cpu"
