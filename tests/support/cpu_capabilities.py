"""``python -m tests.support.cpu_capabilities``: the values of ATEN_CPU_CAPABILITY that this CPU can run."""

from __future__ import annotations

import torch

# From the slowest to the fastest: a CPU that can run one can run those before it.
X86 = ("default", "avx2", "avx512")


def capabilities(best: str) -> tuple[str, ...]:
    """``best`` is PyTorch's own choice. A CPU of another kind runs its own in the whole suite."""
    return X86[: X86.index(best) + 1] if best in X86 else X86[:1]


if __name__ == "__main__":
    print(*capabilities(torch.backends.cpu.get_cpu_capability().lower()), sep="\n")
