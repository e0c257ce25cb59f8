"""A mean that follows a change of load."""

from __future__ import annotations

# High enough to follow a change of load within some measurements.
_WEIGHT_OF_NEWEST = 0.3


class MovingMean:
    """Exponentially weighted: each new value counts three tenths. ``value`` is None before the first."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, new: float) -> None:
        self.value = new if self.value is None else self.value + _WEIGHT_OF_NEWEST * (new - self.value)
