"""HEAD, OPTIONS and browsers of other origins, at a critic over a real socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from stepalign.errors import ConfigError
from stepalign_critic.app import AppSettings
from stepalign_critic.backends import create_backend
from stepalign_critic.backends.base import Generation, RenderedPrompt
from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.http.access import ApiKeys
from stepalign_critic.http.admission import MAX_HEADERS
from stepalign_critic.service import CriticService
from stepalign_run.config import CriticServerSection, load_critic_config
from support.critic_processes import critic_process, write_config
from support.critic_servers import CORRECT, error_of, metric, serving, wait_until

pytestmark = pytest.mark.slow

READ = ["/health", "/health/live", "/health/ready", "/version", "/openapi.json", "/v1/models", "/metrics"]
PAGE = "https://app.example.org"
GUARDED = AppSettings(api_keys=ApiKeys(["sk-one"]), cors_origins=(PAGE,))
KEY = {"authorization": "Bearer sk-one"}


def service() -> CriticService:
    return CriticService(create_backend(CriticServerSection(backend="program", checker="lab")), "lab-v1")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(service()) as address:
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        yield address


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    """A critic with keys that pages of ``PAGE`` may ask."""
    with serving(service(), GUARDED) as address:
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        yield address


@pytest.mark.parametrize("path", READ)
def test_head_is_what_get_is_without_the_body(url: str, path: str) -> None:
    with httpx.Client(base_url=url) as client:
        head, whole = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        # The metrics have counted one request more.
        assert head.headers[name] == whole.headers[name] or (path, name) == ("/metrics", "content-length")
    assert head.headers["x-request-id"].startswith("req_")


def test_head_of_a_critic_that_is_not_ready_says_so(shared: str) -> None:
    stopping = service()
    with serving(stopping) as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        stopping.lifecycle.stop()
        assert httpx.head(f"{url}/health/ready").status_code == 503
    assert httpx.head(f"{shared}/health").status_code == 200
    assert httpx.head(f"{shared}/version").status_code == 401
    assert httpx.head(f"{shared}/version", headers=KEY).status_code == 200


def test_head_of_the_metrics_port(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-a\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = write_config(tmp_path, api_keys_file=str(keys), metrics_port=port)
    with critic_process(config) as (_, _):
        head = httpx.head(f"http://127.0.0.1:{port}/metrics")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 0
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert httpx.post(f"http://127.0.0.1:{port}/metrics").status_code == 405


READING, ASKING = "GET, HEAD, OPTIONS", "OPTIONS, POST"


@pytest.mark.parametrize(
    ("path", "allow"), [*((path, READING) for path in READ), ("/v1/critiques", ASKING), ("/v1/critiques/batch", ASKING)]
)
def test_options_and_every_405_say_what_is_allowed(url: str, path: str, allow: str) -> None:
    asked = httpx.request("OPTIONS", url + path)
    assert (asked.status_code, asked.headers["allow"], asked.content) == (204, allow, b"")
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - set(allow.split(", ")):
        answer = httpx.request(method, url + path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allow)
        if method != "HEAD":
            assert error_of(answer)["code"] == "method_not_allowed"
            assert error_of(answer)["message"] == f"{method} is not allowed here; {allow} are"


def test_options_of_nothing_is_nothing(url: str) -> None:
    assert httpx.request("OPTIONS", f"{url}/nowhere").status_code == 404


def test_options_need_a_key_where_the_path_does(shared: str) -> None:
    assert httpx.request("OPTIONS", f"{shared}/v1/critiques").status_code == 401
    assert httpx.request("OPTIONS", f"{shared}/v1/critiques", headers=KEY).status_code == 204
    assert httpx.request("OPTIONS", f"{shared}/health").status_code == 204


def preflight(
    url: str, origin: str, method: str = "POST", headers: str = "authorization, content-type"
) -> httpx.Response:
    asked = {"origin": origin, "access-control-request-method": method, "access-control-request-headers": headers}
    return httpx.request("OPTIONS", f"{url}/v1/critiques", headers=asked)


def test_no_page_may_ask_by_default(url: str) -> None:
    assert "access-control-allow-origin" not in preflight(url, PAGE).headers
    answer = httpx.post(f"{url}/v1/critiques", json=CORRECT, headers={"origin": PAGE})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_a_page_of_a_named_origin_may_ask_and_its_preflight_needs_no_key(shared: str) -> None:
    sent = "authorization, content-type, x-request-id, x-request-timeout-ms"
    asked = preflight(shared, PAGE, headers=sent)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, PAGE)
    assert set(sent.split(", ")) <= set(asked.headers["access-control-allow-headers"].lower().split(", "))
    answer = httpx.post(f"{shared}/v1/critiques", json=CORRECT, headers={"origin": PAGE, **KEY})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    shown = answer.headers["access-control-expose-headers"].split(", ")
    assert {"x-request-id", "retry-after", "x-stepalign-cache"} <= set(shown)


def test_other_pages_may_not(shared: str) -> None:
    asked = preflight(shared, "https://evil.example.org")
    assert (asked.status_code, error_of(asked)["code"]) == (400, "cors_refused")
    said = "pages of https://evil.example.org may not ask; critic.cors_origins names the origins that may"
    assert error_of(asked)["message"] == said
    assert "access-control-allow-origin" not in asked.headers
    answer = httpx.get(f"{shared}/health", headers={"origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("method", "headers", "said"),
    [
        ("PUT", "authorization", "pages may not use PUT; GET, HEAD, POST, OPTIONS are allowed"),
        (
            "POST",
            "authorization, X-Mine,x-other",
            "pages may not send the headers 'x-mine, x-other'; allowed are accept, ",
        ),
        ("PUT", "x-mine", "are allowed; pages may not send the headers 'x-mine'; "),
        ("POST", "", "pages may not send the headers ''; allowed are"),
    ],
    ids=["method", "headers", "both", "empty"],
)
def test_a_refused_preflight_says_what_is_refused(shared: str, method: str, headers: str, said: str) -> None:
    asked = preflight(shared, PAGE, method, headers)
    assert (asked.status_code, error_of(asked)["code"]) == (400, "cors_refused")
    assert said in error_of(asked)["message"] and "cors_origins" not in error_of(asked)["message"]
    # By it a page's console tells the refused header from the refused page.
    assert asked.headers["access-control-allow-origin"] == PAGE


def test_preflights_are_requests_too() -> None:
    """They have ids, are counted, and are refused by their heads as others are."""
    with serving(service(), AppSettings(cors_origins=(PAGE,))) as url:
        for origin, status in ((PAGE, 200), ("https://evil.example.org", 400)):
            line = f'stepalign_critic_requests_total{{path="/v1/critiques",status="{status}"}}'
            before = metric(url, line)
            assert preflight(url, origin).headers["x-request-id"].startswith("req_")
            assert metric(url, line) == before + 1
        asked = {"origin": PAGE, "access-control-request-method": "POST", **{f"x-{n}": "" for n in range(MAX_HEADERS)}}
        answer = httpx.request("OPTIONS", f"{url}/v1/critiques", headers=asked)
        assert (answer.status_code, error_of(answer)["code"]) == (431, "headers_too_large")
        assert answer.headers["access-control-allow-origin"] == PAGE


def test_errors_can_be_read_by_the_page_too() -> None:
    class Failing(ProgramBackend):
        async def generate(self, prompt: RenderedPrompt) -> Generation:
            raise KeyError("a bug")

    failing = CriticService(Failing("failing", lambda question, attempt: "", "r"), "lab-v1")
    with serving(failing, replace(GUARDED, max_body_bytes=1024)) as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        long = {**CORRECT, "attempt": "x" * 2000}
        for status, body, key in (
            (401, CORRECT, {}),
            (413, long, KEY),
            (422, {"question": "1"}, KEY),
            (500, CORRECT, KEY),
        ):
            answer = httpx.post(f"{url}/v1/critiques", json=body, headers={"origin": PAGE, **key})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
            assert error_of(answer)
        assert httpx.put(f"{url}/health", headers={"origin": PAGE}).headers["access-control-allow-origin"] == PAGE


def test_the_setting_reaches_the_process(tmp_path: Path) -> None:
    with critic_process(write_config(tmp_path, cors_origins=["*"])) as (_, url):
        assert preflight(url, PAGE).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["app.example.org", "https://app.example.org/", "https://a.org/page", ""])
def test_what_is_no_origin_is_refused_at_the_start(tmp_path: Path, origin: str) -> None:
    with pytest.raises(ConfigError, match=r"critic\.cors_origins"):
        load_critic_config(write_config(tmp_path, cors_origins=[origin]), [], {})
