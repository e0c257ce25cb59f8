"""The critic service beside its peers: writes ``benchmarks/results/critic.json``.

    make bench-critic

Three comparisons, each with its peer measured in the same run and by turns:

- the service, as it decodes and grades by default, over an engine of fixed latency, beside a bare FastAPI route over
  the same engine: added time at one connection, requests a second and the 99th percentile at 32
  (:mod:`benchmarks.critic.http`);
- the backend ``openai`` over httpx's own transport and over ``httpx-aiohttp``, before the same server;
- tokens a second of vLLM inside the service, beside vLLM's own offline engine
  (:mod:`benchmarks.critic.vllm_comparison`).

``--only-http`` makes the first comparison alone, in two minutes, and writes no file.

Exits with 1 when a bound is missed, after writing the file, and when something could not be measured, without writing.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import report
from benchmarks.critic.http import Http, Transports, measure_http, measure_transports
from benchmarks.critic.load import LoadSettings, Rounds
from benchmarks.critic.overhead import OverheadSettings
from benchmarks.critic.processes import ROOT
from benchmarks.critic.vllm_comparison import VllmComparison, VllmSettings, measure_vllm
from benchmarks.errors import BenchError
from benchmarks.report import Bound

RESULTS = ROOT / "benchmarks" / "results" / "critic.json"
MOST_OVERHEAD_MS = 1.5
LEAST_LOAD_RATIO = 0.226
"""What it was before aligned decoding (2026-11-27)."""
LEAST_VLLM_RATIO = 0.95

_OVERHEAD, _LOAD, _VLLM = OverheadSettings(), LoadSettings(), VllmSettings()
_console = Console()


def main(
    output: Annotated[Path, report.output_option("critic")] = RESULTS,
    vllm_python: Path = typer.Option(
        ROOT / ".venv-vllm" / "bin" / "python", help="Of an environment with vLLM and the critic."
    ),
    only_http: bool = typer.Option(False, "--only-http", help="Show the comparison with a bare route; write nothing."),
) -> None:
    """Measure the critic service."""
    signal.signal(signal.SIGTERM, _leave)
    begin = time.monotonic()
    machine = report.machine()
    try:
        if only_http:
            _show_http(_measure_http())
            return
        http, transports, vllm = _measure_http(), _measure_transports(), _measure_vllm(vllm_python)
    except BenchError as error:
        _console.print(f"[red]not measured:[/red] {escape(str(error))}")
        raise typer.Exit(1) from error
    bounds = {**_http_bounds(http), "vllm_throughput_ratio": Bound(vllm.ratio, at_least=LEAST_VLLM_RATIO)}
    peers = _peers(http, transports, vllm)
    figures = {
        "benchmark": "critic",
        "command": shlex.join(["python", "-m", "benchmarks.bench_critic", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - begin,
        "bounds_kept": all(bound.kept for bound in bounds.values()),
        **{name: bound.value for name, bound in bounds.items()},
        "p99_ms_32": http.throughput.p99_ms,
        "peers": peers,
        "bounds": {name: bound.as_dict() for name, bound in bounds.items()},
        "machine": {**machine, "vllm": vllm.versions},
        "parameters": {"overhead": asdict(_OVERHEAD), "load": asdict(_LOAD), "vllm": asdict(_VLLM)},
        "details": {"http": asdict(http), "transports": asdict(transports), "vllm": asdict(vllm)},
    }
    report.write(output, figures)
    report.show(_console, bounds, {"p99_ms_32": http.throughput.p99_ms, **peers})
    _console.print(f"{escape(str(output))}, after {figures['seconds']:.0f} s")
    if not figures["bounds_kept"]:
        raise typer.Exit(1)


def _measure_http() -> Http:
    _console.print("http: the service and a bare route over an engine of fixed latency")
    return measure_http(_OVERHEAD, _LOAD)


def _measure_transports() -> Transports:
    _console.print("transports: the backend openai over httpx and over httpx-aiohttp")
    return measure_transports(_LOAD)


def _measure_vllm(python: Path) -> VllmComparison:
    _console.print("vllm: tokens a second inside the service and offline")
    return measure_vllm(python, _VLLM)


def _show_http(http: Http) -> None:
    bounds = _http_bounds(http)
    report.show(_console, bounds, {"p99_ms_32": http.throughput.p99_ms, **_http_peers(http)})
    if not all(bound.kept for bound in bounds.values()):
        raise typer.Exit(1)


def _http_bounds(http: Http) -> dict[str, Bound]:
    return {
        "overhead_p50_ms": Bound(http.overhead.overhead_p50_ms, at_most=MOST_OVERHEAD_MS),
        "rps_32_ratio_to_bare": Bound(http.throughput.ratio_to(http.bare_throughput), at_least=LEAST_LOAD_RATIO),
    }


def _http_peers(http: Http) -> dict[str, float]:
    return {
        "bare_overhead_p50_ms": http.bare_overhead.overhead_p50_ms,
        **_load_figures("bare", http.bare_throughput),
        "rps_32": http.throughput.per_second,
    }


def _peers(http: Http, transports: Transports, vllm: VllmComparison) -> dict[str, float]:
    return {
        **_http_peers(http),
        **_load_figures("openai_httpx", transports.httpx),
        **_load_figures("openai_httpx_aiohttp", transports.aiohttp),
        "aiohttp_ratio_to_httpx": transports.aiohttp.ratio_to(transports.httpx),
        "vllm_service_tokens_per_second": vllm.service_tokens_per_second,
        "vllm_offline_tokens_per_second": vllm.offline_tokens_per_second,
    }


def _load_figures(name: str, rounds: Rounds) -> dict[str, float]:
    return {f"{name}_rps_32": rounds.per_second, f"{name}_p99_ms_32": rounds.p99_ms}


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM becomes an exception, which ends the servers on its way out."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    typer.run(main)
