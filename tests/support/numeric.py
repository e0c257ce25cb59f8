"""Comparing floating-point results that are equal but for rounding.

Bit for bit the same on one machine, with one number of threads and the same shapes: a run and its resumption, two runs
of one configuration, an adapter that is loaded again. Equal but for rounding, and compared here: the same rollouts in
other batches, micro-batches, chunks, paddings or orders, and two ways to compute one value. Rounding there depends on
the CPU's instruction set, and an element near 0 of a large tensor has any relative error; the tensor's norm does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """``‖ours − theirs‖ / ‖theirs‖`` in float64; 0 for two tensors of zeros."""
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).norm().item()
    return difference / theirs.double().norm().item() if difference else 0.0


def assert_close_to_norm(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], tolerance: float) -> None:
    """Every tensor differs from its counterpart by at most ``tolerance`` of the counterpart's norm."""
    assert len(ours) == len(theirs) > 0
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"tensor {worst}: {errors[worst]:.2e} of its norm, over {tolerance:.0e}"
