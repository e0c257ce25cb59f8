"""The whole stack in containers, as docs/operations.md has a user run it: one story, told in the order of the tests.

Images and `up`; the run trains while critics are added, drained and killed under client load, and while Redis and the
trainer are restarted; it ends with a report and a balanced ledger; `down -v` leaves nothing.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from stepalign import CritiqueRequest
from stepalign.client import CriticClient
from stepalign.errors import StepalignError
from stepalign_lab.domain import FACTS, apply, reference_solution, sample_chain, step_bodies, tagged, wrong_facts
from stepalign_run.config import load_config

ROOT = Path(__file__).parents[2]
PROCESSES = ("critic", "solver", "trainer")
UPDATE_SECONDS = 120
REQUESTS, CONCURRENCY = 1500, 16
# Loose, for machines with other work: how long it takes is for make bench-lb to say.
JOIN_SECONDS, OUT_SECONDS = 30, 20
LAB = load_config(ROOT / "configs" / "lab.toml", [], {})
BATCH, STEPS = LAB.trainer.batch, LAB.trainer.steps

# Building the images on a fresh machine counts for the first test.
pytestmark = pytest.mark.timeout(1800)


class Stack(Protocol):
    """What conftest.py gives."""

    project: str
    version: str
    url: str
    port: int
    environment: dict[str, str]

    def run(self, *command: str, timeout: float = 300, check: bool = True) -> str: ...
    def manual_says(self, command: str, timeout: float = 300) -> str: ...
    def containers(self, service: str) -> list[dict[str, Any]]: ...
    def logs(self, service: str) -> str: ...
    def events(self, service: str) -> list[dict[str, Any]]: ...
    def remains(self) -> list[str]: ...
    def volumes(self) -> set[str]: ...
    def wait_until_answering(self, url: str) -> None: ...


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Asking costs: each call of ``docker`` takes a tenth of a second of processor time from what it looks at."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(1)
    return value


@pytest.fixture(scope="session")
def key(stack: Stack) -> str:
    return stack.run("make", "-s", "key").strip()


def updates(stack: Stack) -> list[dict[str, Any]]:
    return [event for event in stack.events("trainer") if event["event"] == "update"]


def seconds_of(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


# --- before anything runs


def test_compose_accepts_every_profile(engine: dict[str, str], stack: Stack) -> None:
    del engine
    services = {
        profile: set(stack.run("docker", "compose", "--profile", profile, "config", "--services").split())
        for profile in ("cpu", "vllm-cpu", "gpu")
    }
    shared = {"init", "redis", "cache", "lb"}
    assert services["cpu"] == shared | {"critic", "solver", "trainer", "evaluate", "report"}
    assert services["vllm-cpu"] == shared | {"critic-vllm-cpu"}
    assert services["gpu"] == shared | {
        "models",
        *(f"{name}-gpu" for name in ("critic", "solver", "trainer", "evaluate", "report")),
    }
    gpu = json.loads(stack.run("docker", "compose", "--profile", "gpu", "config", "--format", "json"))["services"]
    for name in ("critic-gpu", "solver-gpu", "trainer-gpu", "evaluate-gpu"):
        (device,) = gpu[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
    for name in ("solver-gpu", "trainer-gpu"):
        assert gpu[name]["build"]["args"]["TORCH_INDEX"] == ""
    critic = gpu["critic-gpu"]
    assert critic["image"] == f"stepalign-critic-gpu:{stack.version}"
    assert (critic["build"]["target"], critic["build"]["args"]["CRITIC_BACKEND"]) == ("critic", "vllm")
    assert "critic" in critic["networks"]["critics"]["aliases"]


@pytest.mark.parametrize("process", PROCESSES)
def test_an_image_is_labelled_and_holds_no_build_tools(stack: Stack, process: str) -> None:
    image = f"stepalign-{process}:{stack.version}"
    (found,) = json.loads(stack.run("docker", "image", "inspect", image))
    labels = found["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == stack.version
    assert labels["org.opencontainers.image.title"] == f"stepalign {process}"
    assert found["Config"]["User"] == "stepalign"
    assert found["Config"]["Healthcheck"]["Test"][:2] == ["CMD", "python"]
    inside = (
        "import importlib.util, os, shutil, sys\n"
        "print(os.getuid(), [t for t in ('gcc', 'cc', 'make', 'git', 'curl', 'g++') if shutil.which(t)],"
        " importlib.util.find_spec('pip'), os.access('/app', os.W_OK), sys.prefix)"
    )
    said = stack.run("docker", "run", "--rm", "--entrypoint", "python", image, "-c", inside)
    assert said.split() == ["10001", "[]", "None", "False", "/opt/stepalign"]
    assert stack.run("docker", "run", "--rm", image, "--version").strip() == "0.1.0"


def test_a_critic_without_keys_serves_nobody_outside_its_container(stack: Stack) -> None:
    image = f"stepalign-critic:{stack.version}"
    command = ["docker", "run", "--rm", "--name", f"{stack.project}-open", image]
    assert stack.run(*command, check=False) == ""
    code = stack.run("bash", "-c", f"{' '.join(command)} 2>&1; echo $?", check=False)
    assert "set critic.api_keys_file" in code and code.strip().endswith("1")


def test_a_container_without_an_init_process_ends_at_once_when_told_to(stack: Stack) -> None:
    """Its own process is the first, which the kernel gives no default action for SIGTERM."""
    name = f"{stack.project}-first"
    image = f"stepalign-solver:{stack.version}"
    redis = ["-e", "STEPALIGN_QUEUE__REDIS_URL=redis://nowhere", "-e", "STEPALIGN_QUEUE__RECONNECT_SECONDS=600"]
    stack.run("docker", "run", "-d", "--name", name, *redis, image)
    try:
        log = ["bash", "-c", f"docker logs {name} 2>&1"]
        wait_until(lambda: "redis does not answer" in stack.run(*log), 60, "the solver to look for Redis")
        began = time.monotonic()
        stack.run("docker", "stop", "--time", "30", name)
        assert time.monotonic() - began < 15
        assert json.loads(stack.run("docker", "inspect", name))[0]["State"]["ExitCode"] == 143
    finally:
        stack.run("docker", "rm", "-fv", name)


# --- up


def test_training_is_seen_soon_after_up(stack: Stack) -> None:
    created = seconds_of(stack.containers("init")[0]["Created"][:26] + "+00:00")
    wait_until(lambda: updates(stack), UPDATE_SECONDS, "the first update")
    assert seconds_of(updates(stack)[0]["timestamp"]) - created < UPDATE_SECONDS


def health(stack: Stack, name: str) -> str:
    (container,) = stack.containers(name)
    return container["State"]["Health"]["Status"]


def test_every_service_is_locked_down_and_healthy(stack: Stack) -> None:
    names = ("redis", "cache", "lb", "critic", "solver", "trainer", "evaluate", "report")
    for name in names:
        (container,) = stack.containers(name)
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["Memory"] > 0, name
        assert container["Config"]["User"] not in ("", "root", "0") or name == "lb", name
        keys = any(mount["Destination"] == "/run/api-keys" for mount in container["Mounts"])
        assert keys == (name in ("critic", "trainer")), name
        if name != "report":
            wait_until(lambda name=name: health(stack, name) == "healthy", 60, f"the health of {name}")
    # The balancer's image names its user itself.
    assert stack.run("docker", "compose", "exec", "-T", "lb", "id", "-u").strip() == "99"
    assert stack.containers("init")[0]["State"]["ExitCode"] == 0


def test_the_manuals_ways_to_watch_show_the_run(stack: Stack) -> None:
    assert "critic" in stack.manual_says("docker compose ps -a")
    status = stack.manual_says("docker compose exec trainer stepalign queue status configs/lab.toml")
    assert "the ledger is balanced" in status
    for service, shown in (("trainer", '"event": "update"'), ("report", "validation")):
        follow = f"docker compose logs -f {service}"
        assert f"\n{follow}\n" in stack_manual()
        wait_until(
            lambda follow=follow, shown=shown: shown in stack.run("timeout", "5", *follow.split(), check=False),
            90,
            shown,
        )


def test_only_the_balancer_can_be_reached_and_only_from_this_machine(stack: Stack) -> None:
    published = {
        name: [binding for bindings in container["NetworkSettings"]["Ports"].values() for binding in bindings or []]
        for name in ("redis", "cache", "lb", "critic", "solver", "trainer", "evaluate", "report")
        for container in stack.containers(name)
    }
    assert published.pop("lb") == [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]
    assert set(map(str, published.values())) == {"[]"}
    for network in ("queue", "critics"):
        (found,) = json.loads(stack.run("docker", "network", "inspect", f"{stack.project}_{network}"))
        assert found["Internal"], network


def test_no_secret_stands_in_an_environment_or_on_a_command_line(stack: Stack, key: str) -> None:
    cat = ("docker", "compose", "run", "--rm", "-T", "--no-deps", "--entrypoint", "cat", "init")
    passwords = [stack.run(*cat, f"/run/{auth}/password") for auth in ("redis-auth", "cache-auth")]
    assert len(set(passwords)) == 2 and {len(password) for password in passwords} == {64} and len(key) == 67
    for name in ("redis", "cache", "lb", "critic", "solver", "trainer", "evaluate", "report"):
        shown = json.dumps(stack.containers(name)) + stack.logs(name)
        assert not any(secret in shown for secret in (*passwords, key)), name


def test_the_service_answers_curl_as_the_manual_has_it(stack: Stack) -> None:
    begin = stack_manual().index("KEY=$(make -s key)")
    command = stack_manual()[begin : stack_manual().index("\n```", begin)]
    answer = json.loads(stack.manual_says(command))
    assert answer["critique"]["verdict"] == "incorrect"
    assert answer["critique"]["first_error_step"] == 2


def stack_manual() -> str:
    return (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "without_key", "with_key"),
    [
        ("/health", 200, 200),
        ("/health/live", 200, 200),
        ("/health/ready", 200, 200),
        ("/version", 401, 200),
        ("/openapi.json", 401, 200),
        ("/v1/nowhere", 401, 404),
        ("/metrics", 404, 404),
        ("/metrics/", 404, 404),
        ("//metrics", 404, 404),
        ("/%6detrics", 404, 404),
        ("/v1/../metrics", 401, 404),
        ("/v1/%2e%2e/metrics", 401, 404),
    ],
)
def test_what_the_outside_sees(stack: Stack, key: str, path: str, without_key: int, with_key: int) -> None:
    for headers, expected in (({}, without_key), ({"authorization": f"Bearer {key}"}, with_key)):
        # httpx would tidy the path up.
        connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=30)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        assert answer.status == expected
        assert "# HELP stepalign_critic_" not in text
        if expected != 200:
            assert set(json.loads(text)["error"]) == {"message", "type", "code", "param"}


def of_the_critics(stack: Stack) -> list[str]:
    """The lines of each critic's metrics, as something inside its network sees them."""
    ask = "import urllib.request as r; print(r.urlopen('http://localhost:8301/metrics').read().decode())"
    texts = [
        stack.run("docker", "exec", container["Id"], "python", "-c", ask)
        for container in stack.containers("critic")
        if container["State"]["Running"]
    ]
    return [line for text in texts for line in text.splitlines()]


def test_metrics_are_for_the_inside(stack: Stack, key: str) -> None:
    counted = [line for line in of_the_critics(stack) if line.startswith("stepalign_critic_critiques_total")]
    assert sum(float(line.split()[-1]) for line in counted) > 0
    (critic,) = stack.containers("critic")
    assert all(not binding for binding in critic["NetworkSettings"]["Ports"].values())
    shown = httpx.get(f"{stack.url}/openapi.json", headers={"authorization": f"Bearer {key}"}).json()["paths"]
    assert "/metrics" not in shown and "/v1/critiques" in shown


def test_critics_share_their_answers_and_the_cache_evicts(stack: Stack, key: str) -> None:
    """A critic that is started anew knows what it has answered before."""
    body = CritiqueRequest(question="3 + 4", attempt="<step_1> 3 + 4 = 7 </step_1> <answer> 7 </answer>", answer="7")

    def ask() -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{stack.url}/v1/critiques", json=body.model_dump(mode="json"), headers=headers, timeout=60)

    first = ask()
    assert first.status_code == 200 and first.headers["x-stepalign-cache"] == "miss"
    stack.run("docker", "compose", "restart", "critic")
    wait_until(lambda: health(stack, "critic") == "healthy", 120, "the critic's health")
    stack.wait_until_answering(f"{stack.url}/health/ready")
    second = ask()
    assert second.headers["x-stepalign-cache"] == "shared"
    assert {**second.json(), "id": ""} == {**first.json(), "id": ""}
    info = (
        'REDISCLI_AUTH="$(cat /run/cache-auth/password)" redis-cli config get maxmemory-policy;'
        ' REDISCLI_AUTH="$(cat /run/cache-auth/password)" redis-cli dbsize'
    )
    policy, size = stack.run("docker", "compose", "exec", "-T", "cache", "sh", "-c", info).split()[1:]
    assert policy == "allkeys-lru" and int(size) > 0


# --- restarts


def test_redis_and_the_trainer_are_restarted_in_mid_run(stack: Stack) -> None:
    assert stack.containers("trainer")[0]["State"]["Running"]
    stack.manual_says("docker compose restart redis")
    seen = len(updates(stack))
    wait_until(lambda: len(updates(stack)) > seen, 120, "an update after Redis was restarted")
    stack.manual_says("docker compose restart trainer")
    seen = len(updates(stack))
    wait_until(lambda: len(updates(stack)) > seen, 120, "an update after the trainer was restarted")
    assert any(event["event"] == "resumed" for event in stack.events("trainer"))


# --- replicas come and go under load


class Load:
    """Clients of the SDK that ask without a pause, and what came of it: who answered when, and what failed."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key
        self._ending = threading.Event()
        self.answers: list[tuple[float, str, str]] = []
        self.failures: list[StepalignError] = []
        self.repeated: list[str] = []
        """What the SDK itself had to ask for again: the balancer should leave it nothing of that."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join(180)
        assert not self._thread.is_alive()

    def first_from(self, server: str, after: float = 0) -> float | None:
        return next((at for at, name, _ in self.answers if name == server and at > after), None)

    def servers(self, after: float) -> Counter[str]:
        return Counter(name for at, name, _ in self.answers if at > after)

    async def _work(self) -> None:
        load = self

        class Noting(httpx.AsyncHTTPTransport):
            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                try:
                    response = await super().handle_async_request(request)
                except httpx.TransportError as error:
                    load.repeated.append(repr(error))
                    raise
                if response.status_code != 200:
                    load.repeated.append(f"{response.status_code}")
                else:
                    answer = (time.time(), response.headers["x-served-by"], response.headers["x-request-id"])
                    load.answers.append(answer)
                return response

        requests = self._requests()
        limits = httpx.Limits(max_connections=CONCURRENCY)
        async with CriticClient(self._url, api_key=self._key, transport=Noting(limits=limits)) as client:

            async def ask() -> None:
                while not self._ending.is_set():
                    try:
                        await client.critique(next(requests))
                    except StepalignError as error:
                        self.failures.append(error)

            await asyncio.gather(*(ask() for _ in range(CONCURRENCY)))

    @staticmethod
    def _requests() -> Iterator[CritiqueRequest]:
        """Attempts like those of the lab's solver, wrong where it is wrong."""
        rng = random.Random(7)
        believed = {fact: apply(*fact) for fact in FACTS} | wrong_facts(0)
        for _ in itertools.count():
            chain = sample_chain(rng)
            results = chain.results(believed)
            yield CritiqueRequest(
                question=chain.question,
                attempt=tagged(step_bodies(chain, results, "own"), results[-1]),
                reference_solution=reference_solution(chain),
                answer=str(chain.results()[-1]),
            )


@pytest.fixture(scope="session")
def load(stack: Stack, key: str) -> Iterator[Load]:
    load = Load(stack.url, key)
    load.start()
    yield load
    load.end()


def ready_since(stack: Stack, container: dict[str, Any]) -> float | None:
    """When a critic's backend had started, by its own log, the last time that it did."""
    log = stack.run("bash", "-c", f"docker logs {container['Id']} 2>&1")
    started = [json.loads(line) for line in log.splitlines() if '"event": "backend started"' in line]
    return seconds_of(started[-1]["timestamp"]) if started else None


def server_name(load: Load, stack: Stack, replica: dict[str, Any]) -> str:
    """Under which name the balancer knows a replica: that of the answers whose request ids are in the replica's log."""
    log = stack.run("bash", "-c", f"docker logs {replica['Id']} 2>&1")
    answered = {json.loads(line)["request_id"] for line in log.splitlines() if '"event": "critique"' in line}
    (name,) = {server for _, server, request_id in load.answers if request_id in answered}
    return name


def test_new_replicas_take_load_as_soon_as_they_are_ready(stack: Stack, load: Load) -> None:
    wait_until(lambda: len(load.answers) > 20, 60, "the first answers")
    assert set(load.servers(0)) == {"critic-1"}
    stack.manual_says("docker compose up -d --wait --no-recreate --scale critic=3 critic")
    wait_until(lambda: len(load.servers(0)) == 3, 180, "three servers")
    first, *new = stack.containers("critic")
    assert server_name(load, stack, first) == "critic-1" and len(new) == 2
    for replica in new:
        ready, taken = ready_since(stack, replica), load.first_from(server_name(load, stack, replica))
        assert ready is not None and taken is not None
        assert 0 <= taken - ready < JOIN_SECONDS
    assert load.failures == [] and load.repeated == []


def test_a_replica_that_is_taken_away_drains_and_exits_with_0(stack: Stack, load: Load) -> None:
    since = int(time.time())
    stack.manual_says("docker compose up -d --no-recreate --scale critic=2 critic")
    until = time.time()
    events = stack.run(
        *("docker", "events", "--since", str(since), "--until", f"{until + 1:.0f}", "--format", "{{json .Actor}}"),
        *("--filter", "event=die", "--filter", f"label=com.docker.compose.project={stack.project}"),
    )
    ended = [json.loads(line)["Attributes"] for line in events.splitlines()]
    # `init` ends too: every `up` runs it again.
    (gone,) = [container for container in ended if container["com.docker.compose.service"] != "init"]
    assert gone["com.docker.compose.service"] == "critic" and gone["exitCode"] == "0"
    kept = [replica["Id"] for replica in stack.containers("critic")]
    assert len(kept) == 2
    stack.run("env", "CRITICS=2", "docker", "compose", "up", "-d")
    assert [replica["Id"] for replica in stack.containers("critic")] == kept
    before = len(load.answers)
    wait_until(lambda: len(load.answers) > before + 50, 120, "answers after the drain")
    assert len(load.servers(load.answers[before][0])) == 2
    assert load.failures == [] and load.repeated == []


def down_at(stack: Stack, server: str, after: float) -> float | None:
    """When the balancer gave a server up, by its own log."""
    (balancer,) = stack.containers("lb")
    log = stack.run("bash", "-c", f"docker logs --timestamps {balancer['Id']} 2>&1")
    told = [seconds_of(f"{line[:26]}+00:00") for line in log.splitlines() if f"Server critics/{server} is DOWN" in line]
    return next((at for at in told if at > after), None)


def test_a_replica_that_is_killed_is_out_at_once_and_comes_back(stack: Stack, load: Load) -> None:
    (victim, *_) = stack.containers("critic")
    server = server_name(load, stack, victim)
    # From inside, so that Docker sees a crash, which it answers with a restart, and no order of ours.
    kill = (
        "import os, signal; from pathlib import Path\n"
        "for p in Path('/proc').glob('[0-9]*'):\n"
        "    words = (p / 'cmdline').read_bytes().split(b'\\0') if int(p.name) != os.getpid() else []\n"
        "    if b'critic' in words and not words[0].endswith(b'init'): os.kill(int(p.name), signal.SIGKILL)"
    )
    killed = time.time()
    stack.run("docker", "exec", victim["Id"], "python", "-c", kill, check=False)
    out = wait_until(lambda: down_at(stack, server, killed), 30, "the balancer to give the replica up")
    assert out - killed < OUT_SECONDS
    since = wait_until(
        lambda: (at := ready_since(stack, victim)) is not None and at > killed and at, 180, "its readiness"
    )
    back = wait_until(lambda: load.first_from(server, out), 60, "its load")
    assert 0 <= back - since < JOIN_SECONDS
    (again,) = [container for container in stack.containers("critic") if container["Id"] == victim["Id"]]
    assert again["RestartCount"] == 1
    assert load.failures == [] and load.repeated == []


def test_1500_requests_and_not_one_failed(load: Load) -> None:
    wait_until(lambda: len(load.answers) >= REQUESTS, 600, f"{REQUESTS} answers")
    load.end()
    assert load.failures == [] and load.repeated == []


# --- the end


@pytest.fixture(scope="session")
def report(stack: Stack) -> dict[str, Any]:
    def ended() -> bool:
        states = [stack.containers(name)[0]["State"] for name in ("solver", "trainer", "evaluate", "report")]
        return all(state["Status"] == "exited" and state["ExitCode"] == 0 for state in states)

    wait_until(ended, 600, "the run to end")
    assert "`make report ARGS=--json`" in stack_manual()
    return json.loads(stack.run("make", "-s", "report", "ARGS=--json"))


def test_the_validation_score_rose(report: dict[str, Any], stack: Stack) -> None:
    validation = report["arms"]["stepalign_scoped"]["validation"]
    assert sorted(map(int, validation)) == list(range(0, STEPS + 1, 10))
    assert validation["0"]["avg_at_12"] < 5
    assert validation[str(STEPS)]["avg_at_12"] > 50
    shown = stack.manual_says("make report")
    assert "60 test problems" in shown and "rollouts published" in shown
    assert f"step {STEPS:>4}" in stack.logs("report")


def test_no_rollout_was_lost_and_none_was_trained_twice(report: dict[str, Any], stack: Stack) -> None:
    command = "docker compose run --rm --no-deps solver queue status configs/lab.toml"
    assert f"`{command}`" in stack_manual()
    status = json.loads(stack.run(*command.split(), "--json"))
    skipped = sum(status["skipped"].values())
    assert status["published"] == STEPS * BATCH
    assert status["trained"] + skipped == status["published"]
    assert (status["stale"], status["dead"], status["length"]) == (0, 0, 0)
    assert status["balanced"]
    assert report["rollouts"]["published"] == status["published"]
    assert report["rollouts"]["trained"] == status["trained"]
    rows = stack.run(
        *("docker", "compose", "run", "--rm", "--no-deps", "-T", "--entrypoint", "cat", "solver"),
        "runs/lab/metrics.jsonl",
    )
    assert [json.loads(row)["step"] for row in rows.splitlines()] == list(range(1, STEPS + 1))
    assert sum(json.loads(row)["trained_rollouts"] for row in rows.splitlines()) == status["trained"]


def test_stop_and_up_keep_the_run_and_the_secrets(report: dict[str, Any], stack: Stack, key: str) -> None:
    for leave in ("docker compose stop", "docker compose down"):
        stack.manual_says(leave)
        stack.manual_says("docker compose up -d")
        stack.wait_until_answering(f"{stack.url}/health/ready")
        assert stack.run("make", "-s", "key").strip() == key
        assert json.loads(stack.run("make", "-s", "report", "ARGS=--json"))["rollouts"] == report["rollouts"]


def test_the_key_can_be_changed_and_the_files_copied(stack: Stack, key: str, tmp_path: Path) -> None:
    stack.manual_says("docker compose run --rm --no-deps --entrypoint rm init /run/api-keys/key")
    stack.manual_says("docker compose up -d --force-recreate")
    stack.wait_until_answering(f"{stack.url}/health/ready")
    other = stack.run("make", "-s", "key").strip()
    assert other != key
    for used, status in ((key, 401), (other, 200)):
        answer = httpx.get(f"{stack.url}/version", headers={"authorization": f"Bearer {used}"})
        assert answer.status_code == status
    command = "docker compose cp report:/app/runs/lab ./lab-run"
    assert f"\n{command}\n" in stack_manual()
    stack.run(*command.replace("./lab-run", str(tmp_path / "lab-run")).split())
    assert (tmp_path / "lab-run" / "adapters" / f"v{STEPS:06d}" / "adapter_model.safetensors").is_file()


def test_down_leaves_nothing(stack: Stack) -> None:
    volumes = stack.volumes()
    assert stack.remains() and len(volumes) > 4
    stack.manual_says("docker compose down -v")
    assert stack.remains() == []
    assert not volumes & set(stack.run("docker", "volume", "ls", "-q").split())
