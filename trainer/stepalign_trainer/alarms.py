"""Guards: figures of an update that say a run is going wrong, before its validation does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepalign_run.config import AlarmsSection

WATCHED = ("entropy", "mean_tokens", "truncated", "grad_norm", "signal_share", "first_token_kl")


class Alarms:
    """Watches the means of the last ``window`` updates. Rows without a figure leave its mean.

    Gradients are clipped at ``max_grad_norm``; smaller ones count as this much.
    """

    def __init__(self, settings: AlarmsSection, max_grad_norm: float) -> None:
        self.settings = settings
        self.max_grad_norm = max_grad_norm
        self.first: list[Mapping[str, Any]] = []
        self.last: list[Mapping[str, Any]] = []

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """The alarms of this update, sorted by name; none before the first window is full."""
        window = self.settings.window
        if len(self.first) < window:
            self.first.append(row)
        self.last = [*self.last, row][-window:]
        if len(self.last) < window:
            return []
        now = {name: _mean(self.last, name) for name in WATCHED}
        then = {name: _mean(self.first, name) for name in WATCHED}
        settings = self.settings
        found = {
            "entropy": _changed(now["entropy"], then["entropy"], settings.entropy_factor, settings.entropy_floor),
            "length": _changed(now["mean_tokens"], then["mean_tokens"], settings.length_factor),
            "grad_norm": _grew(now["grad_norm"], then["grad_norm"], settings.grad_norm_factor, self.max_grad_norm),
            "truncated": _above(now["truncated"], settings.truncated),
            "first_token_kl": _above(now["first_token_kl"], settings.first_token_kl),
            "no_signal": now["signal_share"] is None or now["signal_share"] < settings.signal_share,
        }
        return sorted(name for name, raised in found.items() if raised)


def _mean(rows: list[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else None


def _above(value: float | None, limit: float) -> bool:
    return value is not None and value > limit


def _grew(now: float | None, then: float | None, factor: float, floor: float = 0.0) -> bool:
    return now is not None and then is not None and max(now, floor) > factor * max(then, floor)


def _changed(now: float | None, then: float | None, factor: float, floor: float = 0.0) -> bool:
    return _grew(now, then, factor, floor) or _grew(then, now, factor, floor)
