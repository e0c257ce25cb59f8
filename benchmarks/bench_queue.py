"""The rollout queue beside bare redis-py and beside the pattern of its peers: writes ``benchmarks/results/queue.json``.

    make bench-queue

``publish_ratio`` and ``consume_ratio``: entries a second on bytes that are encoded already ÷ those of bare pipelines in
the same round (:mod:`benchmarks.queue.throughput`); ``publish_ratio_group_1`` is that of groups of one,
``publish_ratio_deep_peer`` that beside a peer with longer pipelines. ``codec_factor``: encoding and decoding a rollout
÷ publishing and consuming it. ``lost`` and ``duplicated``: over twenty kills of the consumer
(:mod:`benchmarks.queue.kills`).
``memory_factor``: the server's memory with a full queue and no trainer ÷ (capacity × payload).

The server is the embedded one with its append-only file, synced every second. Exits with 1 when a bound is missed.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.queue.codecs import measure_codecs
from benchmarks.queue.kills import measure_kills
from benchmarks.queue.payload import rollouts
from benchmarks.queue.throughput import ThroughputSettings, measure_throughput
from benchmarks.report import Bound
from stepalign_launcher.redis_server import EmbeddedRedis
from stepalign_run.queue.codec import encode

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "queue.json"
_SETTINGS = ThroughputSettings()


def main(output: Annotated[Path, report.output_option("queue")] = RESULTS) -> None:
    """Measure the queue."""
    console, begin, machine = Console(), time.monotonic(), report.machine()
    made = rollouts(_SETTINGS.entries, seed=1)
    codecs = measure_codecs(made[:256])
    with tempfile.TemporaryDirectory(prefix="stepalign-bench-") as folder, EmbeddedRedis(Path(folder)) as url:
        throughput = asyncio.run(measure_throughput(url, [encode(rollout) for rollout in made], _SETTINGS))
        kills = measure_kills(url)
    codec_seconds = sum(codecs["pydantic"].values()) / 1e6
    bounds = {
        "publish_ratio": Bound(throughput.publish_ratio, at_least=0.7),
        "consume_ratio": Bound(throughput.consume_ratio, at_least=0.7),
        "codec_factor": Bound(codec_seconds / throughput.seconds_per_entry, at_most=2.0),
        "memory_factor": Bound(throughput.memory_factor, at_most=1.5),
        "lost": Bound(kills["ours"]["lost"], at_most=0),
        "duplicated": Bound(kills["ours"]["duplicated"], at_most=0),
    }
    beside = {
        "publish_ratio_group_1": throughput.publish_ratio_group_1,
        "publish_ratio_deep_peer": throughput.publish_ratio_deep_peer,
    }
    kept = all(bound.kept for bound in bounds.values())
    figures = {
        "benchmark": "queue",
        "command": "make bench-queue",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - begin,
        "bounds_kept": kept,
        **{name: bound.value for name, bound in bounds.items()},
        **beside,
        "payload_bytes": throughput.payload_bytes,
        "codecs_us": codecs,
        "kills": kills,
        "bounds": {name: bound.as_dict() for name, bound in bounds.items()},
        "machine": machine,
        "parameters": asdict(_SETTINGS),
        "details": asdict(throughput),
    }
    report.write(output, figures)
    of_kills = {f"{name}: {what}": count for name, row in kills.items() for what, count in row.items()}
    report.show(console, bounds, {**beside, **of_kills})
    if not kept:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
