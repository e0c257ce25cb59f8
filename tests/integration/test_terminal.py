"""What commands print: every table on terminals of 60 and of 80 columns, with the longest names there are, and texts
that would steer the terminal."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from stepalign.commands.application import build_app
from stepalign.types import FailureReason
from stepalign_run.config import QueueSection, load_config, shipped_arms
from stepalign_run.context import ContextKind
from stepalign_run.probing import CritiqueFigures, ProbePlan
from stepalign_run.queue import RedisRolloutQueue
from stepalign_run.rollout import Rollout
from support.page_runs import write_run
from support.probes import arm, probe_report_of

pytestmark = [pytest.mark.redis, pytest.mark.slow]

LAB = Path(__file__).parents[2] / "configs" / "lab.toml"
REASONS = [f"critique_{reason}" for reason in FailureReason]
LONGEST_ARM = max(shipped_arms(), key=len)
ALARMS = {"advantage_correct_below": {"first_step": 7, "updates": 4}, "first_token_kl": {"first_step": 1, "updates": 1}}
# Sentences about a table are not part of it: the terminal wraps them.
SENTENCES = ("seed 0 only", "report: ", "worth running first: ")

# Colour by ESC and by the one-character CSI, the reading order, and what rich would take for its markup.
HOSTILE = "a\x1b[31mb\u202ec\x9b1md\u200fe\u2066f[/bold]g[red]h"
SHOWN = "a\ufffd[31mb\ufffdc\ufffd1md\ufffde\ufffdf[/bold]g[red]h"
STEERING = set("\x1b\x9b\u202e\u200f\u2066")

WIDTHS = pytest.mark.parametrize("width", [60, 80])


def printed(width: int, *words: str, code: int = 0, **environment: str) -> str:
    result = CliRunner().invoke(
        build_app(), list(words), env={"COLUMNS": str(width), **environment}, catch_exceptions=False
    )
    assert result.exit_code == code, result.output
    return result.stdout


def check(shown: str, names: Iterable[str], width: int) -> None:
    """Each name stands there in one piece, no line is wider than the terminal, and nothing is left out."""
    words = {word.strip(",:()") for word in re.split(r"[\s│┃]+", shown)}
    assert set(names) - words == set()
    assert "…" not in shown
    wide = [line for line in shown.splitlines() if cell_len(line) > width and not line.startswith(SENTENCES)]
    assert wide == []


def harmless(shown: str) -> None:
    """The hostile text is shown, and nothing in it does anything."""
    assert SHOWN in shown
    assert STEERING & set(shown) == set()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A finished run of every arm."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"{name}-0", name, steps=10, tokens=False) for name in shipped_arms()]


@WIDTHS
def test_compare(runs: list[Path], width: int) -> None:
    shown = printed(width, "compare", "--all", *map(str, runs))
    check(shown, ["Avg@12", "Maj@12", "Pass@12", "Trace@12", "difference", "base", "chance", *shipped_arms()], width)


@WIDTHS
def test_probe(tmp_path: Path, width: int) -> None:
    config = load_config(LAB, ["--run.dir", str(tmp_path)])
    report = probe_report_of(config, ProbePlan(samples=2, arms={"stepalign": config.arm}))
    (context,) = report.contexts
    refused = {str(reason): 1 for reason in FailureReason}
    report = report.model_copy(
        update={
            "contexts": [context.model_copy(update={"kind": kind, "left_out": {}}) for kind in ContextKind],
            "arms": [arm(name, 0.5, 0.05, scope="through_first_error") for name in shipped_arms()],
            "critiques": CritiqueFigures(rollouts=12, validated={"unjustified": 4}, refused=refused),
        }
    )
    (tmp_path / "probe.json").write_text(report.model_dump_json())
    check(printed(width, "probe-report", str(tmp_path)), [*shipped_arms(), *ContextKind, *FailureReason], width)


@WIDTHS
def test_report(tmp_path: Path, width: int) -> None:
    name = f"{LONGEST_ARM}-of-the-second-sweep-0"
    folder = write_run(tmp_path / name, LONGEST_ARM, steps=10, name=name, tokens=False, alarms=ALARMS)
    (folder / "run.json").write_text(json.dumps({"arm": LONGEST_ARM, "seed": 0, "started_at": 1.0, "threads": 1}))
    content = json.loads((folder / "report.json").read_text())
    content["rollouts"]["skipped"] = dict.fromkeys(REASONS, 1)
    content["critiques"] = {str(reason): 1 for reason in FailureReason}
    (folder / "report.json").write_text(json.dumps(content))
    options = ("--run.dir", str(tmp_path), "--run.name", name, "--run.arm", LONGEST_ARM, "--trainer.steps", "10")
    shown = printed(width, "report", str(LAB), *options)
    assert re.search(rf"alarm: {next(iter(ALARMS))}, first[^.]+7", shown)
    check(shown, [name, LONGEST_ARM, *FailureReason, *REASONS, *ALARMS, "Avg@12", "Trace@12"], width)


class Queue:
    """A run with a rollout for each reason to skip one, and two dead letters, of which one does not decode."""

    def __init__(self, url: str, folder: Path, make_rollout: Callable[..., Rollout]) -> None:
        self.url, self.name = url, f"{LONGEST_ARM}-{uuid.uuid4().hex}"
        self._make_rollout = make_rollout
        self.dead = f"v000017/{LONGEST_ARM}-train-000123/11"
        self.folder = folder / self.name
        names = [*(f"v000000/lab-train-{number:06}/0" for number in range(len(REASONS))), self.dead]
        outcomes = {name: f"skipped:{reason}" for name, reason in zip(names, REASONS, strict=False)}
        asyncio.run(self._fill([make_rollout(rollout_id=name) for name in names], outcomes))
        self.folder.mkdir()
        self._write("run.json", {"arm": LONGEST_ARM, "seed": 0, "started_at": 1.0, "threads": 1})
        self._write("published.jsonl", {"offered": names}, {"admitted": names})
        self._write("outcomes.jsonl", {"step": 1, "outcomes": outcomes})

    async def _fill(self, rollouts: list[Rollout], outcomes: dict[str, str]) -> None:
        opened = RedisRolloutQueue(self.url, self.name, "trainer", QueueSection())
        await opened.start()
        await opened.publish(rollouts)
        for delivery in await opened.claim(len(rollouts), 0):
            if delivery.rollout.rollout_id == self.dead:
                await opened.dead_letter(delivery.entry_id, "delivered 5 times without an outcome")
            else:
                await opened.acknowledge({delivery.entry_id: outcomes[delivery.rollout.rollout_id]})
        await opened.close()

    def bury(self, reason: str) -> None:
        """One more dead letter."""

        async def work() -> None:
            opened = RedisRolloutQueue(self.url, self.name, "trainer", QueueSection())
            await opened.publish([self._make_rollout(rollout_id="buried", group_id="other")])
            (delivery,) = await opened.claim(1, 0)
            await opened.dead_letter(delivery.entry_id, reason)
            await opened.close()

        asyncio.run(work())

    def _write(self, name: str, *rows: dict[str, Any]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def printed(self, width: int, *words: str) -> str:
        options = ("--run.name", self.name, "--run.arm", LONGEST_ARM, "--queue.redis_url", self.url)
        return printed(width, "queue", *words, str(LAB), *options)


@pytest.fixture
def queue(redis_server: str, tmp_path: Path, make_rollout: Callable[..., Rollout]) -> Queue:
    return Queue(redis_server, tmp_path, make_rollout)


@WIDTHS
def test_queue_status(queue: Queue, width: int) -> None:
    shown = queue.printed(width, "status")
    assert "the ledger is balanced" in shown
    check(shown, [queue.name, *REASONS], width)


def test_no_reason_of_a_dead_letter_steers_the_terminal(queue: Queue) -> None:
    queue.bury(HOSTILE)
    harmless(queue.printed(200, "dlq", "list"))


def test_no_rollout_of_an_audit_steers_the_terminal(queue: Queue) -> None:
    with (queue.folder / "published.jsonl").open("a") as published:
        published.write(json.dumps({"offered": [HOSTILE]}) + "\n" + json.dumps({"admitted": [HOSTILE]}) + "\n")
    shown = printed(200, "run", "audit", str(queue.folder), code=1, REDIS_URL=queue.url)
    assert "they are lost" in shown
    harmless(shown)


@WIDTHS
def test_dead_letters(queue: Queue, width: int) -> None:
    shown = queue.printed(width, "dlq", "list")
    assert "delivered 5 times" in " ".join(shown.split())
    check(shown, ["bytes", "reason", queue.dead], width)


@WIDTHS
def test_audit(queue: Queue, width: int) -> None:
    shown = printed(width, "run", "audit", str(queue.folder), REDIS_URL=queue.url)
    assert "it adds up" in shown
    check(shown, [queue.name, *REASONS], width)


def test_no_name_in_a_comparison_steers_the_terminal(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "hostile", HOSTILE, steps=10, tokens=False, name=HOSTILE),
        write_run(tmp_path / "refsol", "refsol", steps=10, tokens=False),
    ]
    harmless(printed(200, "compare", "--all", *map(str, folders)))
    assert STEERING & set(printed(200, "compare", "--json", *map(str, folders))) == set()


def test_no_name_in_a_report_steers_the_terminal(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", LONGEST_ARM, steps=10, name="run", tokens=False)
    (folder / "run.json").write_text(json.dumps({"arm": LONGEST_ARM, "seed": 0, "started_at": 1.0, "threads": 1}))
    content = json.loads((folder / "report.json").read_text())
    content["critiques"] = {HOSTILE: 1}
    content["alarms"] = {HOSTILE: {"first_step": 1, "updates": 1}}
    (folder / "report.json").write_text(json.dumps(content))
    options = ("--run.dir", str(tmp_path), "--run.name", "run", "--run.arm", LONGEST_ARM, "--trainer.steps", "10")
    shown = printed(200, "report", str(LAB), *options)
    harmless(shown)
    assert shown.count(SHOWN) == 2


def test_no_name_in_a_probe_steers_the_terminal(tmp_path: Path) -> None:
    config = load_config(LAB, ["--run.dir", str(tmp_path)])
    report = probe_report_of(config, ProbePlan(samples=2, arms={"stepalign": config.arm}))
    arms = [arm("stepalign", 0.5, note=HOSTILE), arm(HOSTILE, 0.7)]
    (tmp_path / "probe.json").write_text(report.model_copy(update={"arms": arms}).model_dump_json())
    shown = printed(200, "probe-report", str(tmp_path))
    harmless(shown)
    assert shown.count(SHOWN) == 3  # the table, the note, the recommendation
    as_json = printed(200, "probe-report", str(tmp_path), "--json")
    assert STEERING & set(as_json) == set()
    assert json.loads(as_json)["arms"][1]["arm"] == HOSTILE
