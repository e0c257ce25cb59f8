"""The critic service over real sockets: its API in a thread, its command in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepalign.client import CriticClient
from stepalign.critique.splitting import AnswerRule, SplitRule
from stepalign.errors import ConfigError, CriticRequestError
from stepalign.types import CritiqueRequest, CritiqueResponse, FinishReason, Verdict
from stepalign_critic.app import AppSettings
from stepalign_critic.backends import create_backend
from stepalign_critic.backends.base import Backend, Generation, RenderedPrompt
from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.errors import SaturatedError
from stepalign_critic.http.access import ApiKeys, check_exposure
from stepalign_critic.process import _bind
from stepalign_critic.service import CriticService
from stepalign_run.config import CriticServerSection
from support.critic_processes import address_file, critic_command, critic_process, ended_with_0, write_config
from support.critic_servers import (
    ANSWER,
    CORRECT,
    QUESTION,
    STEP_1,
    STEP_2,
    GatedBackend,
    ask,
    error_of,
    metric,
    serving,
    wait_until,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A ready critic with the lab's exact checker."""
    backend: Backend = create_backend(CriticServerSection(backend="program", checker="lab", prompts="lab-v1"))
    with serving(CriticService(backend, "lab-v1")) as address:
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        yield address


@pytest.fixture
def gated() -> Iterator[tuple[str, GatedBackend, CriticService]]:
    backend = GatedBackend()
    service = CriticService(backend, "lab-v1")
    with serving(service, AppSettings(retry_after_seconds=2.5)) as address:
        yield address, backend, service
        backend.load.set()
        backend.gate.set()


@pytest.mark.parametrize(
    ("attempt", "verdict", "first_error"),
    [
        (f"{STEP_1} {STEP_2} {ANSWER}", Verdict.CORRECT, None),
        ("<step_1> 7 * 7 = 9 </step_1> <answer> 9 </answer>", Verdict.UNJUSTIFIED, 1),
        (f"{STEP_1} <step_2> 7 *", Verdict.INCOMPLETE, None),
        (f"{STEP_1} <step_2> 7 * 7 = 1 </step_2> <answer> 1 </answer>", Verdict.INCORRECT, 2),
    ],
)
def test_every_verdict_reaches_the_client(url: str, attempt: str, verdict: Verdict, first_error: int | None) -> None:
    outcome = f'stepalign_critic_critiques_total{{outcome="{verdict}"}}'
    before = metric(url, outcome)
    response = ask(url, CritiqueRequest(question=QUESTION, attempt=attempt, answer="9"))
    assert response.critique is not None
    assert (response.critique.verdict, response.critique.first_error_step) == (verdict, first_error)
    assert response.critique.answer == "9"
    assert metric(url, outcome) == before + 1


MESSY = (
    "\ufeff<think>7 * 7 = 1?</think>\r\nSure!\r\n<STEP 1>3 +\u200b 4 = 7\r\n<step>7 * 7 = 1</Step_9></step>\r\n"
    "<answer>1</answer> I hope it is correct."
)


def test_a_messy_attempt_is_judged_as_it_was_meant(url: str) -> None:
    response = ask(url, CritiqueRequest(question=QUESTION, attempt=MESSY, answer="9"))
    assert response.attempt.rule is SplitRule.REPAIRED_TAGS
    assert response.attempt.tagged == ("<step_1>3 + 4 = 7</step_1>\n<step_2>7 * 7 = 1</step_2>\n<answer>1</answer>")
    assert [MESSY[slice(*span)] for span in response.attempt.steps] == ["3 +\u200b 4 = 7", "7 * 7 = 1"]
    critique = response.critique
    assert critique is not None and (critique.verdict, critique.first_error_step) == (Verdict.INCORRECT, 2)
    assert critique.alignment.first_difference is not None
    assert MESSY[slice(*critique.alignment.first_difference)] == "7 * 7 = 1"


def test_an_answers_tag_alone_leaves_the_other_text_its_steps(url: str) -> None:
    attempt = "<think>hm</think>3 + 4 = 7\n7 * 7 = 9\n<answer>9</answer>"
    response = ask(url, CritiqueRequest(question=QUESTION, attempt=attempt, answer="9"))
    assert (response.attempt.rule, response.attempt.answer_rule) == (SplitRule.LINES, AnswerRule.TAG)
    assert response.critique is not None and response.critique.verdict is Verdict.CORRECT
    assert response.critique.alignment.copied_steps == 2


def test_a_result_that_nothing_announces_is_an_answer_and_no_breaking_off(url: str) -> None:
    response = ask(url, CritiqueRequest(question=QUESTION, attempt="3 + 4 = 7\n7 * 7 = 8\nSo 8.", answer="9"))
    assert (response.attempt.rule, response.attempt.answer_rule) == (SplitRule.LINES, AnswerRule.CONCLUSION)
    critique = response.critique
    assert critique is not None and (critique.verdict, critique.first_error_step) == (Verdict.INCORRECT, 2)


def test_an_unaligned_answer_is_an_answer_with_a_failure(url: str) -> None:
    outcome = 'stepalign_critic_critiques_total{outcome="verdict_disagrees"}'
    before = metric(url, outcome)
    answer = httpx.post(f"{url}/v1/critiques", json={**CORRECT, "answer": "5"})
    assert answer.status_code == 200
    assert answer.json()["critique"] is None
    assert answer.json()["failure"]["reason"] == "verdict_disagrees"
    assert metric(url, outcome) == before + 1


def test_health_and_version_answer(url: str) -> None:
    for path, status in (("/health", "ready"), ("/health/ready", "ready"), ("/health/live", "live")):
        answer = httpx.get(url + path)
        assert (answer.status_code, answer.json()) == (200, {"status": status})
    version = httpx.get(f"{url}/version").json()
    assert version["schema_version"] == 1
    assert (version["critic"]["backend"], version["critic"]["model"]) == ("program", "lab")
    assert "/v1/critiques" in httpx.get(f"{url}/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code", "param"),
    [
        ("GET", "/nowhere", None, 404, "not_found", None),
        ("GET", "/health/", None, 404, "not_found", None),
        ("GET", "/v1/critiques", None, 405, "method_not_allowed", None),
        ("POST", "/v1/critiques", '{"question": "", "attempt": ""}', 422, "invalid_request", "question"),
        ("POST", "/v1/critiques", '{"question": "1 + 1"}', 422, "invalid_request", None),
        ("POST", "/v1/critiques", '{"question": "1", "attempt": "", "x": 1}', 422, "invalid_request", "x"),
        ("POST", "/v1/critiques", '{"question": "\\ud800", "attempt": ""}', 422, "invalid_request", "question"),
        ("POST", "/v1/critiques", "{", 400, "invalid_json", None),
        ("POST", "/v1/critiques", "[" * 100_000, 400, "invalid_json", None),
        ("POST", "/v1/critiques", '{"question": "hello", "attempt": ""}', 422, "unsupported_request", None),
    ],
)
def test_every_refusal_has_the_envelope_and_a_request_id(
    url: str, method: str, path: str, content: str | None, status: int, code: str, param: str | None
) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.request(method, url + path, content=content, headers=headers)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_request_id_is_echoed_and_a_hostile_one_replaced(url: str) -> None:
    for given, echoed in (("rollout-7", True), ("x" * 201, False), ("a b", False)):
        answer = httpx.post(f"{url}/v1/critiques", json=CORRECT, headers={"x-request-id": given})
        assert (answer.headers["x-request-id"] == given) is echoed


def test_a_body_over_the_limit_is_refused_before_it_is_sent(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"POST /v1/critiques HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n")
        answer = connection.recv(4096)
        assert b" 413 " in answer.splitlines()[0]


def test_a_client_that_reads_only_after_its_whole_body_sees_the_refusal(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"POST /v1/critiques HTTP/1.1\r\nHost: x\r\nContent-Length: 3145728\r\n\r\n")
        for _ in range(12):
            time.sleep(0.01)
            connection.sendall(b" " * 2**18)
        assert b" 413 " in connection.recv(4096).splitlines()[0]


def test_a_body_that_grows_over_the_limit_is_refused(url: str) -> None:
    counter = 'stepalign_critic_requests_total{path="/v1/critiques",status="413"}'
    before = metric(url, counter)
    chunks = (b" " * 2**16 for _ in range(40))
    answer = httpx.post(f"{url}/v1/critiques", content=chunks)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")
    assert metric(url, counter) == before + 1


def test_a_client_with_a_body_over_the_limit_is_told_so_and_does_not_retry(url: str) -> None:
    with pytest.raises(CriticRequestError, match="413 body_too_large"):
        ask(url, CritiqueRequest(question=QUESTION, attempt="x" * 3 * 2**20))


def test_a_body_that_never_comes_to_its_end_is_given_up() -> None:
    service = CriticService(create_backend(CriticServerSection(backend="program", checker="lab")), "lab-v1")
    with (
        serving(service, AppSettings(body_seconds=0.3)) as address,
        socket.create_connection(("127.0.0.1", httpx.URL(address).port or 0), timeout=10) as connection,
    ):
        connection.sendall(b"POST /v1/critiques HTTP/1.1\r\nhost: c\r\ncontent-length: 10\r\n\r\n{")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b" 408 " in answer.splitlines()[0] and b"body_too_slow" in answer


def test_a_body_at_the_limit_is_read(url: str) -> None:
    body = json.dumps(CORRECT).encode()
    answer = httpx.post(
        f"{url}/v1/critiques",
        content=body.ljust(AppSettings().max_body_bytes),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 200


def test_requests_tokens_and_times_are_counted(gated: tuple[str, GatedBackend, CriticService]) -> None:
    url, backend, _ = gated
    backend.load.set()
    backend.gate.set()
    for _ in range(2):
        ask(url, CritiqueRequest(**CORRECT))
    httpx.get(f"{url}/nowhere")
    assert metric(url, 'stepalign_critic_requests_total{path="/v1/critiques",status="200"}') == 2
    assert metric(url, 'stepalign_critic_requests_total{path="other",status="404"}') == 1
    assert metric(url, 'stepalign_critic_critiques_total{outcome="correct"}') == 2
    assert metric(url, 'stepalign_critic_tokens_total{kind="prompt"}') == 10
    assert metric(url, 'stepalign_critic_tokens_total{kind="completion"}') == 6
    assert metric(url, "stepalign_critic_critique_seconds_count") == 2
    assert metric(url, "stepalign_critic_in_flight") == 0


def test_every_answer_of_the_model_counts_even_if_its_request_gets_none() -> None:
    """The first one is refused; the second one never comes, and the client is told to try again."""

    class Broken(ProgramBackend):
        async def generate(self, prompt: RenderedPrompt) -> Generation:
            if "refused" in prompt.messages[-1]["content"]:
                raise SaturatedError("full")
            return Generation("all is well", FinishReason.STOP, 11, 7)

    with serving(CriticService(Broken("broken", lambda question, attempt: "", "r"), "chat-v1")) as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        answer = httpx.post(f"{url}/v1/critiques", json=CORRECT)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "saturated")
        assert metric(url, 'stepalign_critic_answers_total{outcome="unparseable",prompt="critique"}') == 1
        assert metric(url, 'stepalign_critic_tokens_total{kind="prompt"}') == 11
        assert metric(url, 'stepalign_critic_tokens_total{kind="completion"}') == 7
        assert "stepalign_critic_critiques_total{" not in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize(
    ("fields", "rule"), [({"attempt": "a\n" * 1001}, "lines"), ({"attempt": None, "steps": ["a"] * 1001}, "steps")]
)
def test_an_attempt_of_too_many_steps_is_refused(url: str, fields: dict[str, Any], rule: str) -> None:
    answer = httpx.post(f"{url}/v1/critiques", json={**CORRECT, **fields})
    assert (answer.status_code, error_of(answer)["code"]) == (422, "too_many_steps")
    assert f"has 1001 steps by the rule '{rule}', the limit is 1000; send fewer" in error_of(answer)["message"]


def test_an_attempt_of_as_many_steps_as_are_taken_is_answered(url: str) -> None:
    answer = httpx.post(f"{url}/v1/critiques", json={"question": QUESTION, "steps": ["a"] * 1000})
    assert len(answer.json()["attempt"]["steps"]) == 1000


def test_a_loading_critic_lives_but_is_not_ready(gated: tuple[str, GatedBackend, CriticService]) -> None:
    url, backend, _ = gated
    assert httpx.get(f"{url}/health/live").status_code == 200
    assert httpx.get(f"{url}/version").json()["critic"] is None
    for answer in (httpx.get(f"{url}/health/ready"), httpx.post(f"{url}/v1/critiques", json=CORRECT)):
        assert (answer.status_code, error_of(answer)["code"]) == (503, "loading")
        assert answer.headers["retry-after"] == "3"
    backend.load.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)


def test_a_draining_critic_is_not_ready_and_still_serves(gated: tuple[str, GatedBackend, CriticService]) -> None:
    url, backend, service = gated
    backend.load.set()
    backend.gate.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    assert "connection" not in httpx.post(f"{url}/v1/critiques", json=CORRECT).headers
    assert service.lifecycle.drain()
    answer = httpx.get(f"{url}/health/ready")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "draining")
    assert httpx.get(f"{url}/health/live").status_code == 200
    answer = httpx.post(f"{url}/v1/critiques", json=CORRECT)
    assert answer.json()["critique"]["verdict"] == "correct"
    assert answer.headers["connection"] == "close"


def test_a_critic_that_has_not_loaded_has_nothing_to_drain(gated: tuple[str, GatedBackend, CriticService]) -> None:
    _, _, service = gated
    assert not service.lifecycle.drain()
    assert not service.lifecycle.leaving


def test_a_stopping_critic_finishes_what_it_has_and_takes_nothing_new(
    gated: tuple[str, GatedBackend, CriticService],
) -> None:
    url, backend, service = gated
    backend.load.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT)
        wait_until(lambda: backend.attempts)
        service.lifecycle.stop()
        for answer in (httpx.get(f"{url}/health/ready"), httpx.post(f"{url}/v1/critiques", json=CORRECT)):
            assert (answer.status_code, error_of(answer)["code"]) == (503, "stopping")
        backend.gate.set()
        assert running.result(10).status_code == 200


def test_a_saturated_critic_says_when_to_come_back(gated: tuple[str, GatedBackend, CriticService]) -> None:
    url, backend, _ = gated
    backend.load.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT)
        wait_until(lambda: backend.attempts)
        waiting = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT)
        wait_until(lambda: metric(url, "stepalign_critic_in_flight") == 2)
        answer = httpx.post(f"{url}/v1/critiques", json=CORRECT)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "saturated")
        assert answer.headers["retry-after"] == "3"
        backend.gate.set()
        assert [running.result(10).status_code, waiting.result(10).status_code] == [200, 200]


def test_a_client_that_hangs_up_is_not_generated_for(gated: tuple[str, GatedBackend, CriticService]) -> None:
    url, backend, _ = gated
    backend.load.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT)
        wait_until(lambda: backend.attempts)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/critiques", json={**CORRECT, "attempt": "abandoned"}, timeout=0.2)
        wait_until(lambda: metric(url, 'stepalign_critic_requests_total{path="/v1/critiques",status="499"}') == 1)
        backend.gate.set()
        assert running.result(10).status_code == 200
    ask(url, CritiqueRequest(**CORRECT))
    assert "abandoned" not in backend.attempts


def test_a_prompt_over_its_budget_and_a_bug_are_told_apart(gated: tuple[str, GatedBackend, CriticService]) -> None:
    url, backend, _ = gated
    backend.load.set()
    wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
    for attempt, status, code in (("too long", 422, "prompt_too_long"), ("bug", 500, "internal_error")):
        answer = httpx.post(f"{url}/v1/critiques", json={**CORRECT, "attempt": attempt}, timeout=60)
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
        assert "x-request-id" in answer.headers
        assert metric(url, f'stepalign_critic_requests_total{{path="/v1/critiques",status="{status}"}}') == 1


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("::", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_without_keys_only_loopback_hosts_are_served(host: str, allowed: bool) -> None:
    check_exposure(host, ApiKeys(["k"]))
    if allowed:
        check_exposure(host, None)
    else:
        with pytest.raises(ConfigError, match=r"set critic\.api_keys_file"):
            check_exposure(host, None)


def test_the_command_refuses_a_public_host_without_keys(tmp_path: Path) -> None:
    command = critic_command(write_config(tmp_path), "--critic.host", "0.0.0.0")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert "ConfigError: critic.host is '0.0.0.0'" in done.stderr


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """A ready critic that takes the keys ``sk-one`` and ``sk-two``."""
    backend: Backend = create_backend(CriticServerSection(backend="program", checker="lab", prompts="lab-v1"))
    with serving(CriticService(backend, "lab-v1"), AppSettings(api_keys=ApiKeys(["sk-one", "sk-two"]))) as address:
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        yield address


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_needs_no_key(guarded: str, path: str) -> None:
    assert httpx.get(guarded + path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/critiques"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("GET", "/health/"),
        ("GET", "/health/ready/../../version"),
        ("GET", "//health"),
    ],
)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer sk-three", "Bearer sk-onesk-two", "Basic sk-one", "sk-one"]
)
def test_every_other_path_needs_one_that_is_accepted(guarded: str, method: str, path: str, header: str | None) -> None:
    request = httpx.Request(method, guarded + path, headers={} if header is None else {"authorization": header})
    with httpx.Client() as client:
        answer = client.send(request)
    assert answer.status_code == 401
    assert error_of(answer)["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "sk-one" not in answer.text


@pytest.mark.parametrize("header", ["Bearer sk-one", "bearer sk-two", "Bearer  sk-two"])
def test_each_accepted_key_opens_the_service(guarded: str, header: str) -> None:
    answer = httpx.post(f"{guarded}/v1/critiques", json=CORRECT, headers={"authorization": header})
    assert answer.json()["critique"]["verdict"] == "correct"
    assert httpx.get(f"{guarded}/metrics", headers={"authorization": header}).status_code == 404


def test_a_key_in_other_bytes_than_ascii_is_refused_and_breaks_nothing(guarded: str) -> None:
    answer = httpx.get(f"{guarded}/version", headers={"authorization": b"Bearer \xff\xc3"})
    assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")


def test_a_client_without_a_key_sees_the_refusal_of_a_large_body(guarded: str) -> None:
    answer = httpx.post(f"{guarded}/v1/critiques", content=b"x" * 900_000)
    assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")


def test_the_client_sends_its_key(guarded: str) -> None:
    async def main(key: str | None) -> CritiqueResponse:
        async with CriticClient(guarded, api_key=key, timeout=10) as client:
            return await client.critique(CritiqueRequest(**CORRECT))

    assert asyncio.run(main("sk-two")).critique is not None
    for wrong in (None, "sk-three"):
        with pytest.raises(CriticRequestError) as refused:
            asyncio.run(main(wrong))
        assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


def test_with_keys_metrics_have_a_port_of_their_own_without_a_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-a\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = write_config(tmp_path, api_keys_file=str(keys), metrics_port=port)
    with critic_process(config) as (process, url):
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        bearer = {"authorization": "Bearer sk-a"}
        assert httpx.post(f"{url}/v1/critiques", json=CORRECT, headers=bearer).status_code == 200
        assert httpx.get(f"{url}/metrics", headers=bearer).status_code == 404
        assert "/metrics" not in httpx.get(f"{url}/openapi.json", headers=bearer).json()["paths"]
        counted = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert 'stepalign_critic_critiques_total{outcome="correct"} 1.0' in counted.splitlines()
        process.send_signal(signal.SIGTERM)
        ended_with_0(process, config)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")


def test_a_metrics_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-a\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = write_config(tmp_path, api_keys_file=str(keys), metrics_port=taken.getsockname()[1])
        done = subprocess.run(critic_command(config), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "ConfigError: cannot listen on critic.metrics_host:metrics_port 127.0.0.1:" in done.stderr


def test_the_listening_socket_sends_small_packets_at_once() -> None:
    """What it accepts inherits the option; asyncio does not set it on a socket that it was given."""
    with _bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


@pytest.mark.parametrize("content", [None, "", "# only a comment\n", "sk one\n", "sk-\u00e9\n"])
def test_a_key_file_that_holds_no_usable_key_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"critic\.api_keys_file"):
        ApiKeys.from_file(path)


def test_the_command_ends_with_an_error_when_its_model_cannot_be_loaded(tmp_path: Path) -> None:
    config = write_config(tmp_path, backend="transformers", path="nowhere")
    done = subprocess.run(critic_command(config), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "ConfigError: critic.path is" in done.stderr
    assert not address_file(config).exists()


def test_a_runs_file_will_do(tmp_path: Path) -> None:
    """The client's keys and the run's other sections are passed over, whatever they hold."""
    config = write_config(tmp_path)
    client = 'url = "http://127.0.0.1:9"\ntimeout_seconds = 9\n'
    run = '\n[run]\nname = "not a name"\n[trainer]\nsteps = 0\nstepz = 3\n'
    config.write_text(config.read_text().replace("[critic]\n", f"[critic]\n{client}") + run)
    with critic_process(config) as (process, url):
        assert ask(url, CritiqueRequest(**CORRECT)).critique is not None
        process.send_signal(signal.SIGTERM)
        ended_with_0(process, config)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_critic_writes_no_file_unless_told_to(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o500)
    config = write_config(tmp_path)
    config.write_text("\n".join(line for line in config.read_text().splitlines() if "address_file" not in line))
    before = files_below(tmp_path)
    environment = {**os.environ, "HOME": str(empty), "TMPDIR": str(empty)}
    command = critic_command(config)
    with subprocess.Popen(command, cwd=empty, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            listening = json.loads(next(line for line in process.stderr if "listening" in line))
            assert ask(listening["url"], CritiqueRequest(**CORRECT)).critique is not None
            assert files_below(tmp_path) == before
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
    assert files_below(tmp_path) == before


def test_an_address_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "place").write_text("a file in place of its folder")
    command = critic_command(write_config(tmp_path), "--critic.address_file", str(tmp_path / "place" / "critic.url"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "set critic.address_file to a file in a folder that can be written" in done.stderr


def test_a_critic_with_an_unread_log_goes_on_serving_and_ends_with_0(tmp_path: Path) -> None:
    """As with ``2>&1 | head -1``."""
    config = write_config(tmp_path)
    with critic_process(config) as (process, url):
        assert process.stderr is not None
        process.stderr.close()
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        for answer in ("9", "8"):
            assert httpx.post(f"{url}/v1/critiques", json={**CORRECT, "answer": answer}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_an_openai_server_without_models_is_named_at_once_with_a_hint(tmp_path: Path, url: str) -> None:
    """The critic itself stands in for a server whose models are elsewhere."""
    config = write_config(tmp_path, backend="openai")
    lines = config.read_text().replace('checker = "lab"\n', "")
    config.write_text(lines + f'\n[critic.openai]\nbase_url = "{url}"\n')
    with critic_process(config) as (process, own):
        assert process.stderr is not None
        found = next(line for line in process.stderr if "waiting for the model's server" in line)
        assert json.loads(found)["base_url"] == url
        assert "there is no /models (404): critic.openai.base_url ends before it, mostly in /v1" in found
        assert error_of(httpx.get(f"{own}/health/ready"))["code"] == "loading"


def test_a_critic_without_standard_error_serves_and_ends_with_0(tmp_path: Path) -> None:
    """As with ``2>&-``."""
    config = write_config(tmp_path)
    url_file = address_file(config)
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *critic_command(config)]
    with subprocess.Popen(shell) as process:
        try:
            wait_until(lambda: url_file.exists() or process.poll() is not None)
            assert ask(url_file.read_text(), CritiqueRequest(**CORRECT)).critique is not None
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_a_critic_on_a_port_that_is_taken_leaves_the_others_address_alone(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with critic_process(config) as (process, url):
        port = str(httpx.URL(url).port)
        command = critic_command(config, "--critic.port", port)
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 1 and "cannot listen" in second.stderr
        assert address_file(config).read_text() == url
        process.send_signal(signal.SIGTERM)
        ended_with_0(process, config)
