"""The rule for ``device``, in one place for every process. No torch here: the caller names the devices."""

from __future__ import annotations

from stepalign.errors import ConfigError


def choose_device(name: str, *, cuda: bool, mps: bool, xpu: bool = False) -> str:
    """``auto`` takes CUDA, then MPS, then CPU; any other name is taken as it is.

    Raises ConfigError for a kind of device that is not there.
    """
    if name == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    kind = name.partition(":")[0]
    if not {"cpu": True, "cuda": cuda, "mps": mps, "xpu": xpu}[kind]:
        raise ConfigError(f"device is {name!r}; PyTorch finds no {kind} device here: choose another one, or 'auto'")
    return name
