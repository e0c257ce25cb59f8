"""Bodies that the critic does not read: each refusal names the place and what to change."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from stepalign_critic.backends import create_backend
from stepalign_critic.service import CriticService
from stepalign_run.config import CriticServerSection
from support.critic_servers import CORRECT, error_of, serving, wait_until

pytestmark = pytest.mark.slow

PATHS = {"/v1/critiques": json.dumps(CORRECT), "/v1/critiques/batch": json.dumps({"items": [CORRECT]})}
JSON = "application/json"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    section = CriticServerSection(backend="program", checker="lab", prompts="lab-v1")
    with serving(CriticService(create_backend(section), "lab-v1")) as address:
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        yield address


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the body is empty; send a JSON object"),
        (b"{'a': 1}", "Expecting property name enclosed in double quotes at character 1 (line 1, column 2)"),
        (b'{\n"a": }', "Expecting value at character 7 (line 2, column 6)"),
        (b"{} {}", "Extra data at character 3 (line 1, column 4)"),
        (b'{"a": "\n"}', "Invalid control character at"),
        (b'{"a": "\\x"}', "Invalid \\escape"),
        ('{"question": "Größe"}'.encode("latin-1"), "byte 0xf6 at position 16; encode it as UTF-8, not as Latin-1"),
        (b'{"a": "\xed\xa0\x80"}', "byte 0xed at position 7"),
        ('{"a": 1}'.encode("utf-16"), "the body is UTF-16 or UTF-32; encode it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "the body is UTF-16 or UTF-32"),
        ('{"a": 1}'.encode("utf-16-be"), "the body is UTF-16 or UTF-32"),
        ('{"a": 1}'.encode("utf-32"), "the body is UTF-16 or UTF-32"),
        (gzip.compress(b"{}", mtime=0), "the body is compressed with gzip; send it as it is"),
        (b'{"a": NaN}', "the body holds NaN, which is no JSON"),
        (b'{"a": [-Infinity]}', "the body holds -Infinity, which is no JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' is twice in one object of the body"),
        (b'{"a": {"\\ud800": 1, "\\ud800": 2}}', "the key '\\ud800' is twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 20_000, "nested too deeply"),
        (
            b'{"a": ' + b"1" * 5000 + b"}",
            "an integer of over 4300 digits, which no field takes; send fewer, or a string",
        ),
    ],
)
def test_what_is_no_json_in_utf_8_is_told_where(url: str, path: str, content: bytes, said: str) -> None:
    answer = httpx.post(url + path, content=content, headers={"content-type": JSON})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_json", None)
    assert said in error["message"]


@pytest.mark.parametrize(("path", "content"), PATHS.items())
@pytest.mark.parametrize(
    ("header", "value", "said"),
    [
        ("content-type", None, "Content-Type: application/json; no such header was sent"),
        ("content-type", "text/plain", "Content-Type: application/json; text/plain was sent"),
        ("content-type", "application/x-www-form-urlencoded", "was sent, as curl -d does by itself"),
        ("content-type", "json", "json was sent"),
        ("content-type", "application/jsonl", "application/jsonl was sent"),
        ("content-type", "application/json; charset=iso-8859-1", "Content-Type names iso-8859-1; encode the body as"),
        ("content-type", "application/json; charset=UTF-16", "Content-Type names utf-16"),
        ("content-encoding", "gzip", "the header Content-Encoding: gzip is not read; send the body as it is"),
        ("content-encoding", "identity, br", "Content-Encoding: identity, br is not read"),
    ],
)
def test_what_is_not_declared_as_plain_json_is_told_the_header(
    url: str, path: str, content: str, header: str, value: str | None, said: str
) -> None:
    headers = {"content-type": JSON} | ({header: value} if value is not None else {})
    if value is None:
        del headers[header]
    answer = httpx.post(url + path, content=content, headers=headers)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (415, "unsupported_media_type", header)
    assert said in error["message"]
    assert answer.headers.get("accept-post" if header == "content-type" else "accept-encoding")


@pytest.mark.parametrize(("path", "content"), PATHS.items())
@pytest.mark.parametrize(
    ("headers", "before"),
    [
        ({"content-type": "application/json; charset=utf-8"}, b""),
        ({"content-type": 'Application/JSON; charset="UTF-8"'}, b""),
        ({"content-type": "application/problem+json"}, b""),
        ({"content-type": JSON, "content-encoding": "identity"}, b""),
        ({"content-type": JSON}, b"\xef\xbb\xbf"),
    ],
)
def test_what_is_json_is_read(url: str, path: str, content: str, headers: dict[str, str], before: bytes) -> None:
    assert httpx.post(url + path, content=before + content.encode(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"), [({"\ud800": 1}, None), ({"mode": "\ud800"}, "mode"), ({"answer": "\udfff"}, "answer")]
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(url: str, fields: dict[str, Any], param: str) -> None:
    headers, item = {"content-type": JSON}, {**CORRECT, **fields}
    answer = httpx.post(f"{url}/v1/critiques", content=json.dumps(item), headers=headers)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_request", param)
    assert "half of a surrogate pair" in error["message"]
    answer = httpx.post(f"{url}/v1/critiques/batch", content=json.dumps({"items": [item]}), headers=headers)
    (answered,) = answer.json()["items"]
    assert answered["status"] == 422
    assert "half of a surrogate pair" in answered["error"]["message"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_is_told_which_header_it_has_to_send(url: str) -> None:
    def curl(*options: str) -> dict[str, object]:
        command = ["curl", "-s", *options, "-d", json.dumps(CORRECT), f"{url}/v1/critiques"]
        return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)

    assert "Content-Type: application/json; application/x-www-form-urlencoded was sent, as curl -d" in str(curl())
    assert curl("-H", "content-type: application/json")["failure"] is None


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/x-ndjson", "application/x-ndjson"),
        ("application/x-ndjson;q=0", JSON),
        ("application/json, application/x-ndjson;q=0.5", JSON),
        ("text/html", JSON),
    ],
)
def test_a_batch_has_the_form_that_its_client_prefers(url: str, accept: str, kind: str) -> None:
    answer = httpx.post(f"{url}/v1/critiques/batch", json={"items": [CORRECT]}, headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
