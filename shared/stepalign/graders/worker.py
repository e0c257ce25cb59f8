"""A program that compares answers by math-verify: ``[number, answer, known]`` in, ``[number, judgement]`` out.

Nothing of stepalign is imported, so that it starts in a second. The process imports math-verify once, and a child of it
answers. A child that a question costs more than its CPU time or memory is killed by the kernel, whatever code it is
in, and the next one is a fork away. ``[null, null]`` then says that a child has died. All ends with the input, so a
parent that was killed leaves nothing behind. Lines are JSON.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

import math_verify  # pyright: ignore[reportMissingTypeStubs]

CPU_SECONDS = 2.0
"""CPU time of one question. Measured in CPU time, so that a busy machine decides as an idle one does."""
MEMORY_BYTES = 1 << 30
"""Address space of the process that answers."""
QUESTIONS_A_CHILD = 500
"""After so many a fresh child answers: caches of sympy and of the parser grow."""

_RETIRED = 3
# Units are off: the caller has taken them away, and these letters are variables.
_LATEX = math_verify.LatexExtractionConfig(
    normalization_config=math_verify.LatexNormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
)
_WARMING = (r"2\sqrt{3}+\frac{1}{2}", r"(6, x^2)", r"\{1, 2\}", r"x = \pi", r"[1, 2)", r"\text{a}", r"\sin x < 3!")


def _limit_memory() -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except ValueError:
        # macOS refuses the limit; the CPU time still bounds what a question can fill.
        if sys.platform != "darwin":
            raise


def compare(answer: str, known: str) -> bool:
    """Whether two expressions are equal. One that cannot be read is equal to none. Raises what sympy raises."""
    ours, theirs = _read(known), _read(answer)
    if not ours or not theirs:
        return False
    # 15 digits are those of a double. Its own limit of time is an alarm, which a thread could not have either.
    return math_verify.verify(ours, theirs, float_rounding=15, timeout_seconds=0, raise_on_error=True)


def _read(text: str) -> list[Any]:
    arithmetic = not set(text) - set("0123456789.+-*/^() ")
    shown, how = (text, math_verify.ExprExtractionConfig()) if arithmetic else (f"\\boxed{{{text}}}", _LATEX)
    found: list[Any] = math_verify.parse(  # pyright: ignore[reportUnknownVariableType]
        shown, [how], fallback_mode="no_fallback", parsing_timeout=0, raise_on_error=True
    )
    return found


def _answer(answer: str, known: str) -> bool | None:
    try:
        return compare(answer, known)
    except Exception:
        return None


def _serve(output: int) -> int:
    """Answer questions until the input ends (0) or the child is old (``_RETIRED``)."""
    _limit_memory()
    for _ in range(QUESTIONS_A_CHILD):
        line = sys.stdin.buffer.readline()
        if not line:
            return 0
        number, answer, known = json.loads(line)
        # The kernel's SIGPROF ends the process by default, also while it multiplies a huge number in C.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        said = _answer(answer, known)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(output, [number, said])
    return _RETIRED


def _say(output: int, said: str | list[Any]) -> None:
    os.write(output, json.dumps(said).encode() + b"\n")


def main() -> None:
    logging.disable(logging.CRITICAL)
    # What a library prints must not be taken for an answer.
    output = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for text in _WARMING:
        compare(text, text)
    _say(output, "ready")
    while True:
        child = os.fork()
        if child == 0:
            try:
                os._exit(_serve(output))
            except BrokenPipeError:
                os._exit(0)
            except BaseException:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return
        if code != _RETIRED:
            _say(output, [None, None])


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(0)
