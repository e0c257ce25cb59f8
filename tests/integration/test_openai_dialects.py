"""A critic before servers that speak OpenAI's protocol each in their own way, as the critic's callers see it.

The server is a socket that sends what a test says (tests/support/upstream.py); the critic is asked through its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from stepalign.client import CriticClient
from stepalign.errors import CriticUnavailableError
from stepalign.types import CritiqueMode, CritiqueRequest, CritiqueResponse, ErrorBody
from stepalign_critic.backends import create_backend
from stepalign_critic.service import CriticService
from stepalign_lab.checker import exact_critique
from stepalign_run.config import CriticServerSection
from stepalign_trainer.batch.critiques import Critiqued, Critiques
from support.critic_servers import CORRECT, QUESTION, error_of, serving, wait_until
from support.upstream import Reply, Upstream, completion, events, upstream

pytestmark = pytest.mark.slow

WRITTEN = exact_critique(QUESTION, CORRECT["attempt"])
HALF = len(WRITTEN) // 2
KEY = "sk-Tq83hFz_secret-0451"


def section_of(url: str, prompts: str = "lab-v1", **served: Any) -> CriticServerSection:
    limits = {"max_new_tokens": 96, "prompts": prompts}
    return CriticServerSection(backend="openai", openai={"base_url": url, **served}, **limits)  # type: ignore[arg-type]


@contextmanager
def critic(
    answer: Callable[[dict[str, Any]], Reply], models: Reply | None = None, **served: Any
) -> Iterator[tuple[str, Upstream]]:
    """A critic and the server that it asks, at its end of the start, whichever that is."""
    model = Upstream(answer, models)
    with upstream(model) as url, serving(service_of(section_of(url, **served))) as own:
        wait_until(lambda: state_of(own) != "loading")
        yield own, model


def service_of(section: CriticServerSection) -> CriticService:
    return CriticService(create_backend(section), section.prompts)


def state_of(url: str) -> str:
    ready = httpx.get(f"{url}/health/ready")
    return "ready" if ready.status_code == 200 else error_of(ready)["code"]


def trouble_of(url: str) -> str:
    return error_of(httpx.get(f"{url}/health/ready"))["message"]


def post(url: str, timeout: float = 30, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/critiques", json={**CORRECT, **fields}, timeout=timeout)


def is_word(body: dict[str, Any]) -> bool:
    return "the word OK" in body["messages"][-1]["content"]


def after_the_word(reply: Reply) -> Callable[[dict[str, Any]], Reply]:
    """The word is given; every critique gets ``reply``."""
    return lambda body: Reply(completion("OK")) if is_word(body) else reply


@pytest.fixture(scope="module")
def asked() -> Iterator[Callable[[Reply], httpx.Response]]:
    """``asked(reply)``: what a caller gets where the server's answer to the critique is ``reply``."""
    with critic(after_the_word(Reply())) as (url, model):

        def ask(reply: Reply) -> httpx.Response:
            model.answer = after_the_word(reply)
            return post(url)

        yield ask


Asked = Callable[[Reply], httpx.Response]


def outcome_of(answer: httpx.Response) -> str:
    """The verdict, or the reason of the failure."""
    assert answer.status_code == 200, answer.text
    response = CritiqueResponse.model_validate_json(answer.content)
    return response.failure.reason.value if response.critique is None and response.failure else "critique"


# What a server may call the end of an answer.


@pytest.mark.parametrize(
    "reason", ["stop", "eos_token", "", None, "STOP", "abort", "content_filter", "end_turn", 1, {"type": "stop"}]
)
def test_a_finished_answer_is_read_whatever_its_end_is_called(asked: Asked, reason: Any) -> None:
    assert outcome_of(asked(Reply(completion(WRITTEN, reason)))) == "critique"


@pytest.mark.parametrize(
    "reason", ["length", "LENGTH", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens", {"type": "length"}]
)
def test_an_answer_that_ran_out_of_tokens_is_truncated_whatever_that_is_called(asked: Asked, reason: Any) -> None:
    assert outcome_of(asked(Reply(completion(WRITTEN, reason)))) == "truncated"


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (None, (0, 0)),
        ({}, (0, 0)),
        ([], (0, 0)),
        ({"prompt_tokens": 7}, (7, 0)),
        ({"prompt_tokens": None, "completion_tokens": 5.0}, (0, 5)),
        ({"prompt_tokens": 7.5, "completion_tokens": "5"}, (7, 5)),
        ({"prompt_tokens": "many", "completion_tokens": True}, (0, 0)),
        ({"prompt_tokens": -1, "completion_tokens": 10**400}, (0, 0)),
        ({"input_tokens": 7, "output_tokens": 5}, (7, 5)),
    ],
)
def test_usage_is_counted_as_far_as_it_is_told(asked: Asked, usage: Any, counted: tuple[int, int]) -> None:
    answer = asked(Reply(completion(WRITTEN, usage=usage)))
    assert outcome_of(answer) == "critique"
    assert tuple(answer.json()["usage"].values()) == counted


def test_usage_that_is_not_there_is_no_error(asked: Asked) -> None:
    body = completion(WRITTEN)
    del body["usage"]
    assert outcome_of(asked(Reply(body))) == "critique"


def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


STREAM = events(
    chunk(role="assistant", content=""),
    chunk(content=WRITTEN[:HALF]),
    chunk(content=WRITTEN[HALF:]),
    chunk("stop"),
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
)
BODIES: dict[str, Reply] = {
    "parts": Reply(completion([{"type": "text", "text": WRITTEN[:HALF]}, {"type": "text", "text": WRITTEN[HALF:]}])),
    "thinking among parts": Reply(completion([{"type": "thinking", "text": "hm"}, {"type": "text", "text": WRITTEN}])),
    "one part": Reply(completion({"type": "text", "text": WRITTEN})),
    "a value in a part": Reply(completion([{"type": "text", "text": {"value": WRITTEN}}])),
    "a long number beside it": Reply(
        json.dumps(completion(WRITTEN)).encode()[:-1] + b', "created": ' + b"9" * 5000 + b"}"
    ),
    "plain parts": Reply(completion([WRITTEN[:HALF], WRITTEN[HALF:]])),
    "byte order mark": Reply(b"\xef\xbb\xbf" + json.dumps(completion(WRITTEN)).encode()),
    "stream": Reply(STREAM, headers={"content-type": "text/event-stream; charset=utf-8"}),
    "stream called JSON": Reply(STREAM),
    "stream of two choices": Reply(
        events(
            chunk(content=WRITTEN[:HALF]),
            {"choices": [{"index": 1, "delta": {"content": "another"}, "finish_reason": "length"}]},
            {"choices": [{"index": 1, "delta": {"content": "one"}}, *chunk("stop", content=WRITTEN[HALF:])["choices"]]},
        )
    ),
    "stream without a reason": Reply(events(chunk(content=WRITTEN))),
    "stream with bare line ends": Reply(STREAM.replace(b"\n", b"\r"), headers={"content-type": "text/event-stream"}),
    "keep-alive blanks": Reply(b"\n\n   \n" + json.dumps(completion(WRITTEN)).encode(), pieces=40),
    "called text": Reply(completion(WRITTEN), headers={"content-type": "text/plain"}),
    "old completion": Reply({"choices": [{"text": WRITTEN, "finish_reason": "stop"}]}),
    "created": Reply(completion(WRITTEN), status=201),
    "null error": Reply(completion(WRITTEN, error=None)),
    "reasoning beside it": Reply(
        {"choices": [{"message": {"content": WRITTEN, "reasoning_content": "hm"}, "finish_reason": "stop"}]}
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_an_answer_in_another_shape_is_read(asked: Asked, name: str) -> None:
    assert outcome_of(asked(BODIES[name])) == "critique"


def test_a_streams_usage_and_end_are_read(asked: Asked) -> None:
    cut = STREAM.replace(b'"stop"', b'"length"')
    answer = asked(Reply(cut, headers={"content-type": "text/event-stream"}))
    assert outcome_of(answer) == "truncated"
    assert answer.json()["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}


def test_a_text_that_no_utf8_holds_reaches_the_caller_mended(asked: Asked) -> None:
    answer = asked(Reply(b'{"choices": [{"message": {"content": "\\ud83d or \\ud83d\\ude00"}}]}'))
    assert outcome_of(answer) == "unparseable"
    assert answer.json()["failure"]["text"] == "\ufffd or 😀"


MESSAGES: dict[str, tuple[dict[str, Any], Any, str, str, str]] = {
    # Message and end of the answer; reason, words and text of the failure.
    "thinking alone": (
        {"content": None, "reasoning_content": "so 7"},
        "stop",
        "truncated",
        "server's field for thinking",
        "<think>so 7",
    ),
    "reasoning alone": ({"content": "", "reasoning": "so 7"}, "stop", "truncated", "for thinking", "<think>so 7"),
    "thinking cut off": ({"content": None, "reasoning": "so 7"}, "length", "truncated", "thinking", "<think>so 7"),
    "refusal": ({"content": None, "refusal": "I must not."}, "stop", "unparseable", "refuses to answer", "I must not."),
    "tool": ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", "unparseable", "calls a tool", ""),
    "filtered": ({"content": ""}, "content_filter", "unparseable", "content_filter", ""),
    "filtered late": ({"content": "<step_1> 3"}, "content_filter", "unparseable", "content_filter", "<step_1> 3"),
    "nothing": ({"content": None}, "stop", "unparseable", "the answer is empty", ""),
    "a number": ({"content": 7}, "stop", "unparseable", "the answer is empty", ""),
    "no message": ({}, None, "unparseable", "the answer is empty", ""),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_an_answer_without_text_is_a_failure_that_says_why(asked: Asked, name: str) -> None:
    message, reason, expected, said, text = MESSAGES[name]
    answer = asked(Reply({"choices": [{"message": message, "finish_reason": reason}]}))
    assert outcome_of(answer) == expected
    failure = answer.json()["failure"]
    assert said in failure["detail"] and failure["text"] == text


def test_thinking_whose_end_stands_in_its_field_is_read_on(asked: Asked) -> None:
    """A parser of reasoning that does not fit its model puts all of the answer there."""
    message = {"content": None, "reasoning_content": f"so 7</think>{WRITTEN}"}
    assert outcome_of(asked(Reply({"choices": [{"message": message}]}))) == "critique"


# Errors of the server.

SAID = {"error": {"message": "the tokens of this day are used up", "type": "x", "code": "y"}}
ERRORS: dict[str, tuple[Reply, int, str, str]] = {
    # The reply; status and code of the caller's error, and words of its message.
    "rate": (Reply(SAID, 429), 503, "saturated", "status 429: the tokens of this day are used up"),
    "loading": (Reply({"error": {"message": "Loading model", "code": 503}}, 503), 503, "saturated", "Loading model"),
    "overloaded": (Reply(SAID, 529), 503, "saturated", "529"),
    "hidden rate": (Reply({"error": {"message": "slow down", "code": 429}}), 503, "saturated", "429: slow down"),
    "hidden": (Reply({"error": {"message": "upstream died"}}), 502, "engine_error", "upstream died"),
    "hidden in a choice": (
        Reply({"choices": [{"message": {"content": "x"}, "error": {"code": 502, "message": "it died"}}]}),
        502,
        "engine_error",
        "502: it died",
    ),
    "hidden in a stream": (
        Reply(events(chunk(content="x"), {"error": {"message": "it died"}})),
        502,
        "engine_error",
        "it died",
    ),
    "cut stream": (
        Reply(events(chunk(content=WRITTEN), end=""), headers={"content-type": "text/event-stream"}),
        502,
        "engine_error",
        "ended its stream before the end",
    ),
    "broken": (Reply(SAID, 500), 502, "engine_error", "status 500: the tokens of this day"),
    "plain words": (Reply(b"no worker is left", 500), 502, "engine_error", "no worker is left"),
    "Ollama's words": (Reply({"error": "model runner has stopped"}, 500), 502, "engine_error", "runner has stopped"),
    "vLLM's old words": (Reply({"object": "error", "message": "dead", "code": 500}, 500), 502, "engine_error", "dead"),
    "no words": (Reply(b"", 500), 502, "engine_error", "no words"),
    "a page": (Reply(b"<html><title>Welcome</title></html>"), 502, "engine_error", "no chat completion: <html>"),
    "no choice": (Reply({"choices": []}), 502, "engine_error", "no chat completion"),
    "nothing": (Reply(b""), 502, "engine_error", "no chat completion"),
    "deep": (Reply(b"[" * 100_000), 502, "engine_error", "no chat completion"),
    "bytes": (Reply(b"\xff\xfe\x00"), 502, "engine_error", "no chat completion"),
    "gateway": (Reply(b"<html>504 Gateway Time-out", 504), 504, "engine_timeout", "gave up waiting"),
    "no HTTP": (Reply(raw=b"what?\r\n\r\n"), 502, "engine_error", "no answer"),
    "silence": (Reply(raw=b""), 502, "engine_error", "no answer"),
    "half": (Reply(b"{", headers={"content-length": "99"}), 502, "engine_error", "no answer"),
    "no gzip": (Reply(b"{}", headers={"content-encoding": "gzip"}), 502, "engine_error", "no answer"),
    "elsewhere": (Reply(b"", 307, {"location": "//[x"}), 502, "engine_error", "critic.openai.base_url"),
    "too long": (
        Reply({"error": {"message": "maximum context length is 10", "param": "max_tokens"}}, 400),
        422,
        "unsupported_request",
        "maximum context length is 10",
    ),
    "FastAPI's words": (
        Reply({"detail": [{"loc": ["body", "messages"], "msg": "is too long", "type": "x"}]}, 422),
        422,
        "unsupported_request",
        "body.messages: is too long",
    ),
    "moderated": (Reply(SAID, 403), 422, "unsupported_request", "status 403: the tokens"),
    "too large": (Reply(b"", 413), 422, "unsupported_request", "status 413"),
    "wrong key": (Reply(SAID, 401), 502, "engine_error", "critic.openai.api_key_file"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_the_server_reaches_the_caller_with_its_words(asked: Asked, name: str) -> None:
    reply, status, code, words = ERRORS[name]
    answer = asked(reply)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert words in error_of(answer)["message"]
    assert len(error_of(answer)["message"]) < 700


@pytest.mark.parametrize(
    ("given", "status", "least", "most"),
    [
        ("7", 429, 7, 7),
        ("0", 429, 1, 1),
        ("0.2", 503, 1, 1),
        ("in a quarter of an hour", 503, 600, 901),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 503, 1, 1),
        ("999999999", 429, 3600, 3600),
        ("soon", 429, 1, 1),
        ("12", 500, 12, 12),
        ("12", 504, 12, 12),
    ],
)
def test_the_servers_retry_after_is_passed_on_within_bounds(
    asked: Asked, given: str, status: int, least: int, most: int
) -> None:
    if given.startswith("in "):
        given = format_datetime(datetime.now(UTC) + timedelta(minutes=15), usegmt=True)
    assert least <= int(asked(Reply(SAID, status, {"retry-after": given})).headers["retry-after"]) <= most


def test_no_words_of_a_server_carry_a_key_a_link_or_control_characters(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    words = [
        f"Incorrect API key provided: {KEY}.\x1b[31m\nred\u202e\u00ad\U000e0041\ue000",
        "Incorrect API key provided: sk-Tq8**********0451.",
        f"sent: Authorization: Bearer {KEY}",
        f"API key not valid: AIza{'Tq8'}{'x-_' * 10}45, it is expired",
        "1 validation error\n  For further information visit https://errors.pydantic.dev/2.14/v/missing",
        "Client error '400'\nFor more information check: https://developer.mozilla.org/en-US/docs/Web/HTTP/Status/400",
        "long " * 2000,
    ]
    with critic(after_the_word(Reply()), api_key_file=key_file) as (url, model):
        for said in words:
            for status in (400, 429, 500):
                model.answer = after_the_word(Reply({"error": {"message": said}}, status))
                message = error_of(post(url))["message"]
                assert "Tq8" not in message and "0451" not in message and "://" not in message
                assert message.isprintable() and len(message) < 600
    assert model.keys == {f"Bearer {KEY}"}


def test_a_servers_cookies_are_not_kept(asked: Asked) -> None:
    """One that no header takes would fail every request after it."""
    for cookie in ("\xd3\xfe\xe6", "session=of-one-caller"):
        assert outcome_of(asked(Reply(completion(WRITTEN), headers={"set-cookie": cookie}))) == "critique"
    assert outcome_of(asked(Reply(completion(WRITTEN)))) == "critique"


# Fields that a server refuses, and the settings for them.


def without(field: str, said: str) -> Callable[[dict[str, Any]], Reply]:
    """A model that refuses a field, as OpenAI's reasoning models do ``max_tokens``."""
    error = {"message": said, "param": field, "code": "unsupported_parameter"}
    return lambda body: Reply({"error": error}, 400) if field in body else Reply(completion(WRITTEN))


UNSUPPORTED = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
REFUSERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "budget": ("max_tokens", UNSUPPORTED, {"max_tokens_field": "max_completion_tokens"}),
    "no budget": ("max_tokens", "Extra inputs are not permitted", {"omit": ["max_tokens"]}),
    "temperature": ("temperature", "'temperature' does not support 0 with this model", {"omit": ["temperature"]}),
}


@pytest.mark.parametrize("name", REFUSERS)
def test_a_server_that_refuses_our_fields_stops_the_start_and_the_setting_for_it_starts(name: str) -> None:
    field, said, remedy = REFUSERS[name]
    with critic(without(field, said)) as (url, _):
        assert state_of(url) == "failed"
        message = trouble_of(url)
        assert said in message and all(f"critic.openai.{setting}" in message for setting in remedy)
        assert error_of(post(url))["code"] == "failed"
    with critic(without(field, said), **remedy) as (url, model):
        assert state_of(url) == "ready"
        assert outcome_of(post(url)) == "critique"
    assert all(field not in body for body in model.asked)


def test_the_settings_shape_every_request() -> None:
    added = {"reasoning_effort": "low", "provider": {"order": ["a"]}}
    chosen = {"max_tokens_field": "max_completion_tokens", "omit": ["temperature"], "extra_body": added}
    with critic(lambda _: Reply(completion(WRITTEN)), **chosen) as (url, model):
        post(url)
    for body in model.asked:
        assert {key: body[key] for key in body.keys() - {"messages"}} == {
            "model": "critic",
            "max_completion_tokens": 96,
            **added,
        }
    word, _ = model.asked
    assert is_word(word) and len(json.dumps(word)) < 2000


def test_the_command_ends_with_the_setting_in_its_message(tmp_path: Path) -> None:
    model = Upstream(without("max_tokens", UNSUPPORTED))
    config = tmp_path / "critic.toml"
    with upstream(model) as url:
        config.write_text(f'[critic]\nbackend = "openai"\nport = 0\n[critic.openai]\nbase_url = "{url}"\n')
        command = [sys.executable, "-m", "stepalign.cli", "critic", str(config)]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "900"}
        )
    assert ended.returncode == 1
    assert "critic.openai.max_tokens_field" in ended.stderr and "Use 'max_completion_tokens' instead" in ended.stderr
    assert len(model.asked) == 1


def test_without_the_probe_no_word_is_asked_for() -> None:
    with critic(without("max_tokens", UNSUPPORTED), probe=False) as (url, model):
        assert state_of(url) == "ready" and not model.asked
        refused = post(url)
    assert (refused.status_code, error_of(refused)["code"]) == (422, "unsupported_request")
    assert UNSUPPORTED in error_of(refused)["message"] and len(model.asked) == 1


def test_a_server_that_refuses_our_fields_later_makes_the_critic_unhealthy_until_it_takes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stepalign_critic.backends.openai._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("stepalign_critic.backends.openai._LOOKS_BETWEEN_WORDS", 3)
    with critic(lambda _: Reply(completion(WRITTEN))) as (url, model):
        assert outcome_of(post(url)) == "critique"
        model.answer = without("max_tokens", UNSUPPORTED)
        # The first may be the request's own fault: others were taken.
        codes = [error_of(post(url))["code"] for _ in range(3)]
        assert codes == ["unsupported_request", "unhealthy", "unhealthy"]
        assert "critic.openai.max_tokens_field" in trouble_of(url)
        model.answer = lambda _: Reply(completion(WRITTEN))
        wait_until(lambda: state_of(url) == "ready")
        assert outcome_of(post(url)) == "critique"


def test_no_caller_is_told_the_servers_address() -> None:
    """Neither of a server that refuses our fields nor of one that stops a start; the log names it."""

    def told_by(url: str) -> str:
        return post(url).text + httpx.get(f"{url}/health/ready").text

    told: list[str] = []
    with critic(lambda _: Reply(completion(WRITTEN))) as (url, model):
        model.answer = lambda _: Reply(SAID, 401)
        told.append(told_by(url))
        assert state_of(url) == "unhealthy"
    lists = [None, Reply({"data": []}), Reply(SAID, 401), Reply(SAID, 503), Reply(raw=b"what?\r\n\r\n")]
    with capture_logs() as logs:
        for models in lists:
            with critic(without("max_tokens", UNSUPPORTED), models, timeout_seconds=0.2) as (url, _):
                told.append(told_by(url))
                assert state_of(url) == "failed"
    assert not [message for message in told if "127.0.0.1" in message or "/v1" in message]
    logged = [entry["base_url"] for entry in logs if entry["event"] == "the model's server cannot be used"]
    assert len(logged) == len(lists) and all(url.startswith("http://127.0.0.1") for url in logged)


def test_a_key_that_is_refused_later_makes_the_critic_unhealthy_at_once() -> None:
    with critic(lambda _: Reply(completion(WRITTEN))) as (url, model):
        assert outcome_of(post(url)) == "critique"
        model.answer = lambda _: Reply(SAID, 401)
        refused = post(url)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "unhealthy")
        assert "critic.openai.api_key_file" in error_of(refused)["message"]


def test_a_request_that_is_refused_for_itself_leaves_the_critic_ready() -> None:
    with critic(after_the_word(Reply(SAID, 400))) as (url, model):
        for _ in range(4):
            assert error_of(post(url))["code"] == "unsupported_request"
        assert state_of(url) == "ready"
        # One at the start, and one after every second refusal in a row.
        assert sum(map(is_word, model.asked)) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_word_that_fails_is_no_refusal(status: int) -> None:
    with critic(lambda body: Reply(SAID, status) if is_word(body) else Reply(completion(WRITTEN))) as (url, _):
        assert state_of(url) == "ready"
        assert outcome_of(post(url)) == "critique"


def test_a_word_that_takes_long_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepalign_critic.backends.openai._WORD_SECONDS", 0.05)
    slow = Reply(completion("OK"), pause=20)
    with critic(lambda body: slow if is_word(body) else Reply(completion(WRITTEN))) as (url, _):
        assert outcome_of(post(url)) == "critique"


# The list of models.

MODEL_LISTS: dict[str, Reply] = {
    **{f"status {status}": Reply(SAID, status) for status in (400, 401, 403, 404, 405, 501)},
    "empty": Reply({"object": "list", "data": []}),
    "wildcard": Reply({"data": [{"id": "*"}]}),
    "pattern": Reply({"data": [{"id": "openai/*"}, {"id": "other"}]}),
    "page": Reply({"data": [{"id": "other"}], "has_more": True}),
    "bare list": Reply([{"id": "critic"}]),
    "of names": Reply({"data": ["critic"]}),
    "Ollama's": Reply({"models": [{"name": "critic:latest", "model": "critic:latest"}]}),
    "odd entries": Reply({"data": [None, 3, {"id": None}, {"id": "critic"}, {}]}),
    "no list": Reply({"object": "list", "data": None}),
    "a page of HTML": Reply(b"<html>"),
    "byte order mark": Reply(b'\xef\xbb\xbf{"data": [{"id": "critic"}]}'),
    "bytes": Reply(b"\xff\xfe"),
    "elsewhere": Reply(b"", 302, {"location": "/login"}),
}


@pytest.mark.parametrize("name", MODEL_LISTS)
def test_a_list_of_models_in_any_shape_lets_a_named_model_start(name: str) -> None:
    with critic(lambda _: Reply(completion(WRITTEN)), MODEL_LISTS[name], model="critic") as (url, model):
        assert state_of(url) == "ready"
        assert outcome_of(post(url)) == "critique"
    assert {body["model"] for body in model.asked} == {"critic"}


def test_a_server_without_a_list_stays_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepalign_critic.backends.openai._LOOK_SECONDS", 0.01)
    with critic(lambda _: Reply(completion(WRITTEN)), Reply(SAID, 404), model="critic") as (url, model):
        for status, state in ((501, "ready"), (500, "unhealthy"), (404, "ready")):
            model.models = Reply(SAID, status)
            wait_until(lambda state=state: state_of(url) == state)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (Reply({"data": [{"id": "critic", "x": 1}], "has_more": True}), "serves critic, and more"),
        (Reply({"data": [{"id": "*"}]}), r"serves \*, and more"),
        (Reply({"data": [{"id": "a"}, {"id": "b"}]}), "serves a, b"),
        (Reply(SAID, 401), "refuses the key.*critic.openai.model"),
    ],
)
def test_a_model_that_must_be_named_is_asked_for(models: Reply, said: str) -> None:
    with critic(lambda _: Reply(completion(WRITTEN)), models) as (url, _):
        assert state_of(url) == "failed"
        assert re.search(said, trouble_of(url))


# Time.


def long_running(seconds: float) -> tuple[Reply, Reply]:
    """An answer that does not begin, and one that goes on without an end."""
    return Reply(completion(WRITTEN), pause=seconds), Reply(b" " * 4000, pieces=4000, pause=0.01)


@pytest.mark.parametrize("reply", long_running(20))
def test_an_answer_that_takes_too_long_is_not_asked_for_again_at_once(reply: Reply) -> None:
    """Neither by callers who heed Retry-After, nor by the SDK's client within a call."""

    async def ask(url: str) -> None:
        async with CriticClient(url, timeout=15) as client:
            await client.critique(CritiqueRequest.model_validate(CORRECT))

    with critic(after_the_word(reply), timeout_seconds=0.4) as (url, model):
        refused = post(url)
        assert (refused.status_code, error_of(refused)["code"]) == (504, "engine_timeout")
        assert "critic.openai.timeout_seconds" in error_of(refused)["message"]
        assert int(refused.headers["retry-after"]) == 1
        before = len(model.asked)
        with pytest.raises(CriticUnavailableError, match="504 engine_timeout") as unavailable:
            asyncio.run(ask(url))
        assert (unavailable.value.code, unavailable.value.retry_after) == ("engine_timeout", 1.0)
        assert len(model.asked) == before + 1


def test_the_trainer_loses_no_rollout_whose_critique_takes_too_long_once(make_rollout: Any) -> None:
    problem = {"id": "p0", "question": QUESTION, "answer": "9"}
    rollout = make_rollout(problem=problem, text=CORRECT["attempt"])

    async def ask(url: str) -> Critiqued:
        async with CriticClient(url, timeout=15) as client:
            return await Critiques(client, 1).ask(rollout, CritiqueMode.STEP_ALIGNED)

    slow, quick = Reply(completion(WRITTEN), pause=20), Reply(completion(WRITTEN))
    with critic(answering(slow, quick), timeout_seconds=0.4) as (url, model):
        critiqued = asyncio.run(ask(url))
    assert critiqued.outcome == "correct" and critiqued.context
    assert len(model.asked) == 3


def test_a_caller_is_told_to_wait_as_long_as_was_waited_and_a_minute_at_most() -> None:
    with critic(after_the_word(Reply(b"", 408)), timeout_seconds=600) as (url, _):
        assert post(url).headers["retry-after"] == "60"


# The second question.


def answering(*replies: Reply) -> Callable[[dict[str, Any]], Reply]:
    left = iter(replies)
    return lambda body: Reply(completion("OK")) if is_word(body) else next(left)


@pytest.mark.parametrize(
    ("second", "code"),
    [
        (Reply(SAID, 500), "engine_error"),
        (Reply(SAID, 429), "saturated"),
        (Reply(completion(WRITTEN), pause=20), "engine_timeout"),
        (Reply(raw=b""), "engine_error"),
    ],
)
def test_what_a_refused_first_answer_took_is_told_when_the_second_fails(second: Reply, code: str) -> None:
    first = Reply(completion("all is well", usage={"prompt_tokens": 311, "completion_tokens": 17}))
    with critic(answering(first, second), prompts="chat-v1", timeout_seconds=0.5) as (url, _):
        error = error_of(post(url))
        counted = httpx.get(f"{url}/metrics").text
    assert error["code"] == code
    assert "a first answer was refused: unparseable, not in the step-tagged grammar: no tags" in error["message"]
    assert "311 prompt tokens and 17 completion tokens" in error["message"]
    assert 'stepalign_critic_tokens_total{kind="prompt"} 311.0' in counted


def test_a_second_question_that_is_refused_leaves_the_first_failure_with_its_usage() -> None:
    first = Reply(completion("all is well", usage={"prompt_tokens": 311, "completion_tokens": 17}))
    with critic(answering(first, Reply(SAID, 400)), prompts="chat-v1") as (url, _):
        answer = post(url)
    assert outcome_of(answer) == "unparseable"
    assert answer.json()["usage"] == {"prompt_tokens": 311, "completion_tokens": 17}


# Whatever a server sends.


@cache
def documented() -> dict[str, set[str]]:
    """The codes of each status of the route, by its OpenAPI document."""
    file = Path(__file__).parents[2] / "docs" / "openapi.json"
    answers = json.loads(file.read_text(encoding="utf-8"))["paths"]["/v1/critiques"]["post"]["responses"]
    return {
        status: set(answer["content"]["application/json"].get("examples", {})) for status, answer in answers.items()
    }


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[]))
    | st.sampled_from(["length", "stop", WRITTEN, "10", "<think>", "</think>", 429, "503", 10**30]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "error", "code", "message", "detail", "msg", "loc", "content", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
VALID: dict[str, Any] = completion(WRITTEN, error=None) | {"id": "c", "object": "chat.completion", "created": 1}


@st.composite
def mutants(draw: st.DrawFn) -> Any:
    """A completion in which something is another thing, is missing or is there besides."""
    mutant = json.loads(json.dumps(VALID))
    for _ in range(draw(st.integers(1, 3))):
        node: Any = mutant
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            if isinstance(node, dict) and draw(st.booleans()):
                named = ["refusal", "reasoning", "reasoning_content", "tool_calls", "text", "delta", "usage", "error"]
                node[draw(st.sampled_from(named))] = draw(JUNK)
            elif draw(st.booleans()):
                del node[key]
            else:
                node[key] = draw(JUNK)
            break
    return mutant


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    content = draw(
        st.one_of(
            mutants().map(lambda body: json.dumps(body).encode()),
            mutants().map(lambda body: events(body)),
            mutants().map(
                lambda body: b"\xef\xbb\xbf" + json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
            ),
            JUNK.map(lambda body: json.dumps(body).encode()),
            st.binary(max_size=60),
        )
    )
    status = draw(st.sampled_from([200, 200, 200, 200, 201, 204, 301, 307]) | st.integers(200, 599))
    kinds = ["application/json", "text/event-stream", "text/html; charset=x", "", "application/json; charset=utf-16"]
    header = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20)
    headers = {
        "content-type": draw(st.sampled_from(kinds)),
        **draw(st.dictionaries(st.sampled_from(["retry-after", "location", "content-encoding", "set-cookie"]), header)),
        **draw(st.dictionaries(st.just("content-length"), st.sampled_from(["0", "x", "3", "-1"]), max_size=1)),
        **draw(st.dictionaries(st.just("content-encoding"), st.sampled_from(["gzip", "deflate", "br"]), max_size=1)),
    }
    reply = Reply(content, status, headers)
    if draw(st.integers(0, 9)) == 0:
        whole = b"".join(reply.parts())
        start = draw(st.integers(0, len(whole)))
        return Reply(raw=whole[:start] + draw(st.binary(max_size=20)) + whole[start + draw(st.integers(0, 20)) :])
    return reply


@pytest.fixture(scope="module")
def answered() -> Iterator[Callable[[Reply], httpx.Response]]:
    """As ``asked``, with the second question, of a server whose other answers are the same."""
    with critic(lambda _: Reply(completion("OK")), prompts="chat-v1", timeout_seconds=1) as (url, model):

        def ask(reply: Reply) -> httpx.Response:
            model.answer = after_the_word(reply)
            return post(url, timeout=20)

        yield ask


@settings(
    deadline=None,
    max_examples=int(os.environ.get("UPSTREAM_EXAMPLES", "60")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(reply=replies())
def test_whatever_a_server_sends_the_caller_gets_an_answer_or_a_documented_error(
    answered: Callable[[Reply], httpx.Response], reply: Reply
) -> None:
    answer = answered(reply)
    if answer.status_code == 200:
        CritiqueResponse.model_validate_json(answer.content)
        return
    error = ErrorBody.model_validate_json(answer.content).error
    assert error.code in documented()[str(answer.status_code)] and answer.status_code in (422, 502, 503, 504)
    assert error.message.isprintable() and len(error.message) < 2000
