"""Faults at a chosen call inside a process: a kill -9 by its own hand, a wait, a rubbish answer."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib import import_module
from typing import Any


class Action(StrEnum):
    KILL_BEFORE = "kill before"
    KILL_AFTER = "kill after"
    SLOW = "slow"
    """Every call waits for ``seconds`` first."""
    GARBAGE = "garbage"
    """Every call's result has ``text`` in place of its own."""


@dataclass(frozen=True)
class Fault:
    """``place`` is ``module:Class.method`` or ``module:function``; a kill comes at the ``at``-th call of it."""

    place: str
    action: Action
    at: int = 1
    seconds: float = 0.0
    text: str = ""

    def arm(self) -> None:
        """Wrap the function at the place, in this process."""
        module, _, path = self.place.partition(":")
        owner: Any = import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def begin() -> float:
            nonlocal calls
            calls += 1
            if self.action is Action.KILL_BEFORE and calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.seconds if self.action is Action.SLOW else 0.0

        def end(result: Any) -> Any:
            if self.action is Action.KILL_AFTER and calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(result, text=self.text) if self.action is Action.GARBAGE else result

        async def in_turn(*arguments: Any, **options: Any) -> Any:
            await asyncio.sleep(begin())
            return end(await call(*arguments, **options))

        def at_once(*arguments: Any, **options: Any) -> Any:
            time.sleep(begin())
            return end(call(*arguments, **options))

        return in_turn if inspect.iscoroutinefunction(call) else at_once
