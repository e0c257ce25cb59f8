"""One batch of answers through the grader ``math``, some of them hostile: ``benchmarks/results/grader.json``.

    python -m benchmarks.bench_grader

Every answer needs a worker of the pool; ``--hostile`` of a hundred cost more than a comparison may. They are asked by
as many threads as an evaluation has. Measured are the wall time and the most memory that this process and its workers
hold together, looked at every 0.2 s (Linux). Exits with 1 when an answer is missing, a harmless one is unknown, or a
hostile one is called right.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.report import Bound
from stepalign.critique.answers import Judgement
from stepalign.graders.math import POOL, math_equal

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "grader.json"
_THREADS = 8
_HOSTILE = (
    "9**9**9**{}",
    r"\sqrt[{}]{{9^{{9^{{9}}}}}}",
    r"\sum_{{n=1}}^{{10^9}} \frac{{n}}{{{}}}",
    "{}" + "!" * 9,
    "(" * 450 + "{}" + ")" * 450,
)


def answers(count: int, hostile_percent: int) -> list[tuple[str, str, bool]]:
    """Answer, known answer, and whether it is hostile. No two are alike: nothing is answered from memory."""
    made: list[tuple[str, str, bool]] = []
    for i in range(count):
        if i % 100 < hostile_percent:
            made.append((_HOSTILE[i // 100 % len(_HOSTILE)].format(i + 2), "12", True))
        else:
            made.append((f"\\frac{{{i}x}}{{2}}", f"\\frac{{x}}{{2}} \\cdot {i}", False))
    return made


class Memory:
    """The most resident memory of this process and of the pool's workers together, in MiB."""

    def __init__(self) -> None:
        self.most = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.most = max(self.most, sum(map(_resident, ("self", *map(str, POOL.pids())))))


def _resident(process: str) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        # It has just ended.
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("VmRSS:")), "VmRSS: 0")
    return int(line.split()[1]) / 1024


def main(
    count: Annotated[int, typer.Option(min=100, help="How many answers.")] = 10_000,
    hostile: Annotated[int, typer.Option(min=0, max=100, help="How many of a hundred are hostile.")] = 1,
    output: Annotated[Path, report.output_option("grader")] = RESULTS,
) -> None:
    """Measure the pool of the grader math."""
    described, asked = report.machine(), answers(count, hostile)
    begin = time.monotonic()
    with Memory() as memory, ThreadPoolExecutor(_THREADS) as threads:
        said: list[Judgement] = list(threads.map(lambda each: math_equal(each[0], each[1]), asked))
    seconds = time.monotonic() - begin
    pairs = list(zip(asked, said, strict=True))
    bounds = {
        "answered": Bound(len(said), at_least=count),
        "harmless_right": Bound(sum(s is True for (*_, bad), s in pairs if not bad), at_least=count - _bad(asked)),
        "hostile_called_right": Bound(sum(s is True for (*_, bad), s in pairs if bad), at_most=0),
    }
    kept = all(bound.kept for bound in bounds.values())
    figures = {
        "benchmark": "grader",
        "command": "python -m benchmarks.bench_grader",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "bounds_kept": kept,
        "bounds": {name: bound.as_dict() for name, bound in bounds.items()},
        "machine": described,
        "answers": count,
        "hostile": _bad(asked),
        "hostile_unknown": sum(s is None for (*_, bad), s in pairs if bad),
        "seconds": seconds,
        "most_memory_mib": memory.most,
        "threads": _THREADS,
    }
    report.write(output, figures)
    report.show(Console(), bounds, {"seconds": seconds, "most_memory_mib": memory.most})
    if not kept:
        raise typer.Exit(1)


def _bad(asked: list[tuple[str, str, bool]]) -> int:
    return sum(hostile for *_, hostile in asked)


if __name__ == "__main__":
    typer.run(main)
