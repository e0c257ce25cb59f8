"""What schemathesis finds wrong with the critic in every state, and in some on the oldest FastAPI allowed too.

Beyond schemathesis' own checks: each state answers valid requests as that state should, which also shows that it was in
it. tests/support/critic_states.py serves; schemathesis.toml and schemathesis_hooks.py beside it say what is checked.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.requirements import Requirement

from stepalign.types import REQUEST_TIMEOUT_HEADER
from support.critic_states import KEY

TESTS = Path(__file__).parents[1]
# `make setup` makes it.
OLDEST = TESTS.parent / ".cache" / "oldest-fastapi"
# Examples of each operation and kind; those of schemathesis.toml, where the environment names no other number.
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES")
TIMEOUT_SECONDS = 300 if EXAMPLES is None else 3000
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_SECONDS)]

WITH_KEY = {"Authorization": f"Bearer {KEY}"}
CRITIQUES, BATCH, MODELS = "POST /v1/critiques", "POST /v1/critiques/batch", "GET /v1/models"
READINESS = ("GET /health", "GET /health/ready")
# Of requests that are not valid, or that schemathesis takes for that, as it does every OPTIONS.
REJECTED = {204, 400, 401, 405, 413, 415, 422}


@dataclass(frozen=True)
class Expected:
    """What a state answers to valid requests.

    ``critiques`` are the statuses of critiques, ``items`` those of a batch's items; without ``items`` a batch as a
    whole and the list of models get what a critique gets. ``codes`` are the codes of all errors, of items too. What has
    a deadline may also be a 504, whose code is ``deadline_exceeded``, or ``deadline_unreachable`` after some waits.
    """

    critiques: set[int]
    items: set[int] | None = None
    codes: tuple[str, ...] = ()
    readiness: int = 200
    version: int = 200


def refusing(code: str) -> Expected:
    return Expected({503}, codes=(code,), readiness=503)


SERVING = Expected({200}, {200})
# Of each case its name, the state, what it answers, and headers of every request.
CASES: list[tuple[str, str, Expected, dict[str, str]]] = [
    ("loading", "loading", refusing("loading"), {}),
    ("ready", "ready", SERVING, {}),
    ("lines", "ready", SERVING, {"accept": "application/x-ndjson"}),
    ("saturated", "saturated", Expected({503}, {503}, ("saturated",)), {}),
    ("draining", "draining", Expected({200}, {200}, ("draining",), readiness=503), {}),
    ("stopping", "stopping", refusing("stopping"), {}),
    ("failed", "failed", refusing("failed"), {}),
    ("unhealthy", "unhealthy", refusing("unhealthy"), {}),
    ("broken", "broken", Expected({502}, {502}, ("engine_error",)), {}),
    ("behind", "behind", Expected({200}, {200}, ("deadline_unreachable",)), {}),
    ("unsupported", "unsupported", Expected({422}, {422}, ("unsupported_request",)), {}),
    ("key", "guarded", SERVING, WITH_KEY),
    ("no-key", "guarded", Expected({401}, codes=("invalid_api_key",), version=401), {}),
    ("limited", "limited", Expected({200, 429}, {429}, ("rate_limited",)), WITH_KEY),
]
# What another FastAPI may change: reading and checking of bodies, streams of lines, errors of our own, a refusal before
# the route. The other states answer from the same code.
ON_OLDEST = ("ready", "lines", "broken", "no-key")
RUNS = [pytest.param("newest", *case[1:], id=f"{case[0]}-newest") for case in CASES] + [
    pytest.param("oldest", *case[1:], id=f"{case[0]}-oldest") for case in CASES if case[0] in ON_OLDEST
]


@dataclass(frozen=True)
class Exchange:
    """A request of schemathesis and its answer.

    ``valid`` is whether it made the request as the document asks, ``probe`` whether it sent a request once more, with
    no key or a wrong one.
    """

    operation: str
    valid: bool
    probe: bool
    timed: bool
    status: int
    body: str

    def items(self) -> list[dict[str, Any]]:
        """The items of a batch's answer, as lines or not; none in other answers."""
        if self.operation != BATCH or self.status != 200:
            return []
        if self.body.startswith('{"items":'):
            return json.loads(self.body)["items"]
        # Not splitlines: what is a line break elsewhere may stand in JSON as it is.
        return [json.loads(line) for line in self.body.split("\n")[:-1]]

    def codes(self) -> set[str]:
        """The codes of the errors in the answer."""
        if self.status != 200:
            return {json.loads(self.body)["error"]["code"]}
        return {item["error"]["code"] for item in self.items() if item["error"] is not None}


def lower_bound(of: Distribution, name: str) -> str:
    """The lowest version of ``name`` that ``of`` takes."""
    requirements = [Requirement(line) for line in of.requires or []]
    (bound,) = {
        part.version
        for requirement in requirements
        if requirement.name == name
        for part in requirement.specifier
        if part.operator == ">="
    }
    return bound


def versions(fastapi: str) -> dict[str, str]:
    """What the critic has to be served with: what is installed here, or the oldest of what the pins allow."""
    if fastapi == "newest":
        return {name: distribution(name).version for name in ("fastapi", "starlette", "uvicorn")}
    found = list(Distribution.discover(name="fastapi", path=[str(OLDEST)]))
    assert found, f"there is no {OLDEST}; run make setup"
    bounds = {name: lower_bound(distribution("stepalign"), name) for name in ("fastapi", "uvicorn")}
    return bounds | {"starlette": lower_bound(found[0], "starlette")}


@contextmanager
def critic_in(state: str, fastapi: str, folder: Path) -> Iterator[str]:
    """The address of a critic in ``state``. Fails when it left that state by itself or logged an error."""
    log = folder / "critic.log"
    path = [OLDEST, TESTS] if fastapi == "oldest" else [TESTS]
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "support.critic_states", state],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            told = process.stdout.readline()
            assert told, log.read_text()
            assert json.loads(told)["versions"] == versions(fastapi)
            yield json.loads(told)["url"]
            process.stdin.close()
            assert process.wait(20) == 0, log.read_text()
        finally:
            process.kill()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    errors_logged = [line["event"] for line in lines if line["level"] in ("error", "critical")]
    assert errors_logged == (["backend did not start"] if state == "failed" else [])


def examine(url: str, expected: Expected, headers: dict[str, str], folder: Path) -> list[Exchange]:
    """What schemathesis sent and got; it must find nothing."""
    document = httpx.get(f"{url}/openapi.json", headers=WITH_KEY).raise_for_status().text
    (folder / "openapi.json").write_text(document)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(TESTS / "support" / "schemathesis.toml")]
    command += ["run", "openapi.json", "--url", url, "--report", "ndjson", "--report-ndjson-path", "report"]
    command += [part for name, value in headers.items() for part in ("--header", f"{name}: {value}")]
    if EXAMPLES is not None:
        command += ["--max-examples", EXAMPLES]
    if 422 in expected.critiques:
        # The document cannot say which questions a checker can handle. That exactly these are refused is checked here.
        command += ["--exclude-checks", "positive_data_acceptance"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": str(TESTS / "support" / "schemathesis_hooks.py")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(exchanges(folder / "report"))


def exchanges(report: Path) -> Iterator[Exchange]:
    for line in report.read_text(encoding="utf-8").splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for key, interaction in recorder.get("interactions", {}).items():
            case = recorder["cases"][key]
            yield Exchange(
                operation=recorder["label"],
                valid=case["value"]["meta"]["generation"]["mode"] == "positive",
                probe="parent_id" in case,
                timed=REQUEST_TIMEOUT_HEADER in {name.lower() for name in interaction["request"]["headers"]},
                status=interaction["response"]["status_code"],
                body=base64.b64decode(interaction["response"]["content"]["$base64"]).decode(),
            )


@pytest.mark.parametrize(("fastapi", "state", "expected", "headers"), RUNS)
def test_schemathesis_finds_nothing_and_each_answer_is_the_states_own(
    fastapi: str, state: str, expected: Expected, headers: dict[str, str], tmp_path: Path
) -> None:
    with critic_in(state, fastapi, tmp_path) as url:
        seen = examine(url, expected, headers, tmp_path)
    probes = {exchange.status for exchange in seen if exchange.probe}
    assert probes == ({401} if headers == WITH_KEY else set())
    valid = [exchange for exchange in seen if exchange.valid and not exchange.probe]

    def statuses(*operations: str) -> set[int]:
        return {exchange.status for exchange in valid if exchange.operation in operations and not exchange.timed}

    taken = expected.items is not None
    assert statuses(CRITIQUES) == expected.critiques
    assert statuses(BATCH) == ({200} if taken else expected.critiques)
    assert statuses(MODELS) == ({200} if taken else expected.critiques)
    assert statuses(*READINESS) == {expected.readiness}
    assert statuses("GET /health/live") == {200}
    assert statuses("GET /version") == {expected.version}
    answered = [item["status"] for exchange in valid if not exchange.timed for item in exchange.items()]
    assert set(answered) == (expected.items or set())
    late = {"deadline_exceeded", "deadline_unreachable"} - set(expected.codes)
    assert {code for exchange in valid for code in exchange.codes()} - late == set(expected.codes)
    timed = [exchange for exchange in valid if exchange.timed]
    assert {exchange.status for exchange in timed} <= expected.critiques | {200 if taken else 503, 504}
    rejected = {exchange.status for exchange in seen if not exchange.valid and exchange.operation == CRITIQUES}
    assert rejected <= REJECTED | expected.critiques | {504}
    assert 422 in rejected or not taken
