"""Measure the load balancer before the critics and write ``benchmarks/results/lb.json``.

    make bench-lb

Needs Docker with Compose on Linux; the target builds the critic's image. Three measurements of the product's
balancer before critics of fixed capacity:

- overhead: the same request to the same replica, through the balancer and past it, by turns;
- churn: requests of the SDK's client while replicas are added, drained and killed;
- scaling: the throughput of 1 to 8 replicas beside that of one replica without the balancer.

Exits with 1 when a bound is missed, after writing the file, and when something could not be measured, without.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import signal
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import report
from benchmarks.errors import BenchError
from benchmarks.lb.churn import Churn, ChurnSettings
from benchmarks.lb.latency import LatencySettings
from benchmarks.lb.measurements import (
    FIXED,
    IMMEDIATE,
    LOADING,
    Overhead,
    Scaling,
    measure_churn,
    measure_overhead,
    measure_scaling,
)
from benchmarks.lb.scaling import LoadSettings
from benchmarks.lb.stack import HAPROXY_CFG, ROOT, critic_image, engine_version
from benchmarks.report import Bound

RESULTS = ROOT / "benchmarks" / "results" / "lb.json"
MOST_OVERHEAD_MS = 0.3
LEAST_EFFICIENCY = 0.9

_LATENCY, _CHURN, _LOAD = LatencySettings(), ChurnSettings(), LoadSettings()
_console = Console()


def main(
    output: Annotated[Path, report.output_option("lb")] = RESULTS,
    haproxy_cfg: Path = typer.Option(HAPROXY_CFG, exists=True, dir_okay=False, help="A configuration to try instead."),
) -> None:
    """Measure the load balancer."""
    signal.signal(signal.SIGTERM, _leave)
    begin = time.monotonic()
    try:
        _check_system()
        machine = {**report.machine(), "docker_engine": engine_version(), "critic_image": critic_image()}
        overhead, churn, scaling = _measure(haproxy_cfg)
    except BenchError as error:
        _console.print(f"[red]not measured:[/red] {escape(str(error))}")
        raise typer.Exit(1) from error
    bounds = _bounds(overhead, churn, scaling)
    machine["haproxy"] = overhead.haproxy_version
    figures = {
        "benchmark": "lb",
        "command": shlex.join(["python", "-m", "benchmarks.bench_lb", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - begin,
        "bounds_kept": all(bound.kept for bound in bounds.values()),
        **_figures(overhead, churn, scaling),
        "bounds": {name: bound.as_dict() for name, bound in bounds.items()},
        "machine": machine,
        "parameters": _parameters(haproxy_cfg),
        "details": {"overhead": asdict(overhead), "churn": asdict(churn), "scaling": asdict(scaling)},
    }
    report.write(output, figures)
    report.show(_console, bounds, _unbounded(churn))
    _console.print(f"{escape(str(output))}, after {figures['seconds']:.0f} s")
    if not figures["bounds_kept"]:
        raise typer.Exit(1)


def _check_system() -> None:
    if platform.system() != "Linux":
        raise BenchError("this benchmark calls containers by their addresses, which only Linux makes reachable")


def _measure(haproxy_cfg: Path) -> tuple[Overhead, Churn, Scaling]:
    _console.print("overhead: the same requests through the balancer and past it")
    overhead = measure_overhead(haproxy_cfg, _LATENCY)
    _console.print("churn: replicas are added, drained and killed under load")
    churn = measure_churn(haproxy_cfg, _CHURN)
    _console.print("scaling: throughput of 1 to 8 replicas")
    return overhead, churn, measure_scaling(haproxy_cfg, _LOAD)


def _bounds(overhead: Overhead, churn: Churn, scaling: Scaling) -> dict[str, Bound]:
    return {
        "overhead_p50_ms": Bound(overhead.critique.overhead_p50_ms, at_most=MOST_OVERHEAD_MS),
        "failed_requests": Bound(len(churn.failures), at_most=0),
        **{
            f"scaling_efficiency.{replicas}": Bound(value, at_least=LEAST_EFFICIENCY)
            for replicas, value in scaling.efficiency().items()
        },
    }


def _figures(overhead: Overhead, churn: Churn, scaling: Scaling) -> dict[str, Any]:
    return {
        "overhead_p50_ms": overhead.critique.overhead_p50_ms,
        "failed_requests": len(churn.failures),
        **_unbounded(churn),
        "scaling_efficiency": scaling.efficiency(),
        "scaling_share_of_capacity": scaling.of_capacity(),
    }


def _unbounded(churn: Churn) -> dict[str, float]:
    """Of several changes of a kind the slowest is the figure."""
    return {
        "recovery_seconds": max(churn.seconds("kill")),
        "join_seconds": max(churn.seconds("add")),
        "drain_seconds": max(churn.seconds("drain")),
        "client_retries": sum(churn.client_retries.values()),
        "balancer_retries": churn.balancer.retries,
        "balancer_redispatches": churn.balancer.redispatches,
    }


def _parameters(haproxy_cfg: Path) -> dict[str, Any]:
    return {
        "overhead": {**asdict(_LATENCY), "critic": asdict(IMMEDIATE)},
        "churn": {**asdict(_CHURN), "critic": asdict(LOADING)},
        "scaling": {**asdict(_LOAD), "critic": asdict(FIXED)},
        "haproxy_cfg_sha256": hashlib.sha256(haproxy_cfg.read_bytes()).hexdigest(),
    }


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM becomes an exception, which removes the stack on its way out."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    typer.run(main)
