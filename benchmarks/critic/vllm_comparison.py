"""Tokens a second of vLLM inside the service beside those of vLLM's own offline engine on the same prompts.

The service decodes freely: an aligned critique is no single generation, and the offline engine has no such thing.

The same on both sides: SmolLM2-135M, vLLM's build for CPUs, its engine's arguments, the prompts' token ids, greedy
decoding with the same budget. The requests of a round are all there at its beginning, offline as one call of
``LLM.generate``, in the service as one HTTP request each; both engines admit ``max_batch`` of them at a time. The
prompts of every round are new, so both prefix caches hold the instructions and examples of a warm-up round, and nothing
else.

Different: the offline engine is given token ids and gives text, in one process with its caller. The service reads
HTTP, renders the prompts, validates the answers and writes HTTP, and this program's client takes its share of the same
cores. The prompt set has no prompt for a second try, so one critique is one generation, although few of this model's
answers align.

Tokens are those written (completion). Both processes live through all rounds and take turns; the other one waits
without taking time.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.critic.engine import PATH
from benchmarks.critic.processes import LOG, ROOT, URL_FILE, Server, end, end_of_log, started, temporary_folder
from benchmarks.errors import BenchError
from benchmarks.wire import Connection, request_bytes
from stepalign.types import CritiqueRequest
from stepalign_lab.sums import reference_solution

MODEL = ROOT / ".cache" / "smollm2"
# vLLM's offline engine would take another number of tokens a step by default than its server's.
ENGINE_ARGUMENTS = {"max_num_batched_tokens": 2048, "enforce_eager": True}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
_CONFIG = """
[critic]
address_file = "{address}"
backend = "vllm"
path = "{model}"
prompts = "{prompts}"
decoding = "free"
port = 0
max_prompt_tokens = {max_prompt_tokens}
max_new_tokens = {max_new_tokens}
max_batch = {max_batch}

[critic.vllm]
gpu_memory_utilization = 0.2
engine_args = {{ {arguments} }}
"""
_START_SECONDS = 600.0
_ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class VllmSettings:
    """``requests`` are those of a round. Of ``addends`` numbers is a sum; it makes the answers so long."""

    rounds: int = 5
    requests: int = 16
    addends: int = 8
    max_batch: int = 16
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 48
    prompts: str = "sums-v1"


@dataclass(frozen=True)
class Generated:
    """One side's time and tokens in a round, in the order of the requests."""

    seconds: float
    prompt_tokens: list[int]
    completion_tokens: list[int]

    @property
    def tokens_per_second(self) -> float:
        return sum(self.completion_tokens) / self.seconds


@dataclass(frozen=True)
class VllmRound:
    """``equal_lengths`` is the share of requests for which both sides wrote as many tokens."""

    service_tokens_per_second: float
    offline_tokens_per_second: float
    service_tokens: int
    offline_tokens: int
    equal_lengths: float

    @property
    def ratio(self) -> float:
        return self.service_tokens_per_second / self.offline_tokens_per_second


@dataclass(frozen=True)
class VllmComparison:
    rounds: list[VllmRound]
    versions: dict[str, str]

    @property
    def ratio(self) -> float:
        return statistics.median(measured.ratio for measured in self.rounds)

    @property
    def service_tokens_per_second(self) -> float:
        return statistics.median(measured.service_tokens_per_second for measured in self.rounds)

    @property
    def offline_tokens_per_second(self) -> float:
        return statistics.median(measured.offline_tokens_per_second for measured in self.rounds)


def measure_vllm(python: Path, settings: VllmSettings) -> VllmComparison:
    """Both sides by turns; ``python`` is the interpreter of an environment with vLLM and the critic.

    Raises BenchError when one of them does not start, fails, or was given other prompts than the other.
    """
    if not (MODEL / "model.safetensors").exists():
        raise BenchError(f"there are no weights in {MODEL}; make smollm2")
    with temporary_folder("vllm") as folder:
        config = _write_config(folder, settings)
        # One after the other: each looks at how much memory is free when it starts.
        with _offline(python, config) as offline, _service(python, config) as service:
            _round(offline, service, settings, seed=0)
            rounds = [_round(offline, service, settings, seed) for seed in range(1, settings.rounds + 1)]
            return VllmComparison(rounds, offline.versions)


class OfflineEngine:
    """:mod:`benchmarks.critic.offline_engine` in its process: a line of JSON goes in, another one comes out."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self.versions: dict[str, str] = self._read()

    def generate(self, requests: list[CritiqueRequest]) -> Generated:
        """Answer these requests' prompts."""
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps([request.model_dump(mode="json") for request in requests]).encode() + b"\n"
        )
        self._process.stdin.flush()
        return Generated(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"vLLM's offline engine ended:\n{end_of_log(self._folder)}")
        return json.loads(line)


def _write_config(folder: Path, settings: VllmSettings) -> Path:
    path = folder / "critic.toml"
    arguments = ", ".join(f"{name} = {json.dumps(value)}" for name, value in ENGINE_ARGUMENTS.items())
    path.write_text(
        _CONFIG.format(address=folder / "service" / URL_FILE, model=MODEL, arguments=arguments, **asdict(settings)),
        encoding="utf-8",
    )
    return path


@contextmanager
def _offline(python: Path, config: Path) -> Iterator[OfflineEngine]:
    folder = config.parent / "offline"
    folder.mkdir()
    command = [str(python), "-m", "benchmarks.critic.offline_engine", str(config)]
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield OfflineEngine(process, folder)
    finally:
        end(process)


@contextmanager
def _service(python: Path, config: Path) -> Iterator[Server]:
    folder = config.parent / "service"
    folder.mkdir()
    command = [str(python), "-m", "stepalign.cli", "critic", str(config)]
    with started(command, folder, _START_SECONDS, ENVIRONMENT) as server:
        yield server


def _round(offline: OfflineEngine, service: Server, settings: VllmSettings, seed: int) -> VllmRound:
    """One round of both; the order changes with ``seed``."""
    requests = _requests(settings, seed)
    if seed % 2:
        ours, theirs = _ask(service, requests), offline.generate(requests)
    else:
        theirs, ours = offline.generate(requests), _ask(service, requests)
    if ours.prompt_tokens != theirs.prompt_tokens:
        raise BenchError("the service's prompts were not the offline engine's: their numbers of tokens differ")
    lengths = zip(ours.completion_tokens, theirs.completion_tokens, strict=True)
    return VllmRound(
        service_tokens_per_second=ours.tokens_per_second,
        offline_tokens_per_second=theirs.tokens_per_second,
        service_tokens=sum(ours.completion_tokens),
        offline_tokens=sum(theirs.completion_tokens),
        equal_lengths=statistics.fmean(our_length == their_length for our_length, their_length in lengths),
    )


def _requests(settings: VllmSettings, seed: int) -> list[CritiqueRequest]:
    """Sums with running totals that go wrong by one at a random step."""
    rng = random.Random(seed)
    return [_request([rng.randint(1, 9) for _ in range(settings.addends)], rng) for _ in range(settings.requests)]


def _request(addends: list[int], rng: random.Random) -> CritiqueRequest:
    wrong = rng.randrange(1, len(addends))
    total, steps = addends[0], list[str]()
    for position, number in enumerate(addends[1:], 1):
        after = total + number + (position == wrong)
        steps.append(f"<step_{position}>{total} + {number} = {after}</step_{position}>")
        total = after
    return CritiqueRequest(
        question=" + ".join(map(str, addends)),
        attempt="\n".join([*steps, f"<answer>{total}</answer>"]),
        reference_solution=reference_solution(addends),
        answer=str(sum(addends)),
    )


def _ask(service: Server, requests: list[CritiqueRequest]) -> Generated:
    """All of them at once, each on a connection of its own."""
    sent = [request_bytes("POST", PATH, body=request.model_dump_json().encode()) for request in requests]
    with ThreadPoolExecutor(len(sent)) as pool:
        begin = time.perf_counter()
        answers = list(pool.map(lambda request: _exchange(service, request), sent))
        seconds = time.perf_counter() - begin
    return Generated(
        seconds=seconds,
        prompt_tokens=[answer["usage"]["prompt_tokens"] for answer in answers],
        completion_tokens=[answer["usage"]["completion_tokens"] for answer in answers],
    )


def _exchange(service: Server, request: bytes) -> dict[str, Any]:
    with Connection(service.host, service.port, timeout=_ANSWER_SECONDS) as connection:
        answer = connection.exchange(request)
    if answer.status != 200:
        raise BenchError(f"the service answered with {answer.status}: {answer.body[:1000]!r}")
    return json.loads(answer.body)
