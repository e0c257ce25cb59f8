"""The committed OpenAPI document: up to date, complete, and with examples that the service keeps to."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepalign.types import (
    CritiqueBatchItem,
    CritiqueBatchResponse,
    CritiqueRequest,
    CritiqueResponse,
    ErrorBody,
    FinishReason,
    ModelList,
)
from stepalign_critic.backends.base import Generation, RenderedPrompt
from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.http import examples as api_docs
from stepalign_critic.http.openapi import document
from stepalign_critic.service import CriticService

COMMITTED = Path(__file__).parents[3] / "docs" / "openapi.json"
DOCUMENT: dict[str, Any] = json.loads(document())
ANSWERS = [
    (path, method, status, answer)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
    for status, answer in operation["responses"].items()
]
MODELS = {
    "/v1/critiques": CritiqueResponse,
    "/v1/critiques/batch": CritiqueBatchResponse,
    "/v1/models": ModelList,
}


def test_the_committed_document_is_what_the_service_gives() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == document(), (
        "the API has changed; write its document anew: python -m stepalign_critic.http.openapi docs/openapi.json"
    )


@pytest.mark.parametrize(
    ("path", "statuses"),
    [
        ("/v1/critiques", "200 400 401 408 413 415 422 429 500 502 503 504"),
        ("/v1/critiques/batch", "200 400 401 408 413 415 422 500 503"),
        ("/v1/models", "200 401 500 503"),
        ("/health", "200 503"),
        ("/health/ready", "200 503"),
        ("/health/live", "200"),
        ("/metrics", "200 500"),
        ("/version", "200 401 500"),
    ],
)
def test_every_status_is_declared(path: str, statuses: str) -> None:
    assert sorted(status for where, _, status, _ in ANSWERS if where == path) == statuses.split()


def test_no_path_is_left_out_of_these_tests() -> None:
    assert len(DOCUMENT["paths"]) == 8


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [(path, status, answer) for path, _, status, answer in ANSWERS],
    ids=[f"{path} {status}" for path, _, status, _ in ANSWERS],
)
def test_every_answer_has_an_example_that_its_schema_takes(path: str, status: str, answer: dict[str, Any]) -> None:
    for kind, content in answer["content"].items():
        examples = [content["example"]] if "example" in content else [e["value"] for e in content["examples"].values()]
        assert examples
        for example in examples:
            if status != "200":
                assert content["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
                ErrorBody.model_validate(example)
            elif kind == api_docs.NDJSON:
                assert [CritiqueBatchItem.model_validate_json(line).index for line in example.splitlines()] == [1, 0]
            elif path in MODELS:
                MODELS[path].model_validate(example)


def test_an_errors_example_has_the_code_that_it_is_named_for() -> None:
    for _, _, status, answer in ANSWERS:
        for code, example in answer["content"].get("application/json", {}).get("examples", {}).items():
            error = example["value"]["error"]
            assert (error["code"], error["type"] == "server_error") == (code, int(status) >= 500)
    assert "Retry-After" in DOCUMENT["paths"]["/v1/models"]["get"]["responses"]["503"]["headers"]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


def test_every_reference_is_to_something() -> None:
    found = set(references(DOCUMENT))
    assert "#/components/schemas/CritiqueBatchItem" in found
    assert {name.removeprefix("#/components/schemas/") for name in found} <= set(DOCUMENT["components"]["schemas"])


def test_a_step_is_blank_to_the_document_where_it_is_to_the_service() -> None:
    steps = DOCUMENT["components"]["schemas"]["CritiqueRequest"]["properties"]["steps"]
    (pattern,) = [shape["items"]["pattern"] for shape in steps["anyOf"] if shape["type"] == "array"]
    differing = [hex(ord(c)) for c in map(chr, range(sys.maxunicode + 1)) if bool(re.search(pattern, c)) == c.isspace()]
    assert differing == []
    # Another dialect means something else by these.
    assert not re.search(r"\\[sSwW]", pattern)


def test_the_timeout_is_declared_as_a_header() -> None:
    for path in ("/v1/critiques", "/v1/critiques/batch"):
        (parameter,) = DOCUMENT["paths"][path]["post"]["parameters"]
        assert (parameter["in"], parameter["name"], parameter["required"]) == ("header", "x-request-timeout-ms", False)


class Quoting(ProgramBackend):
    """Answers as the critic of the example does."""

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        text = (
            "<step_1>5 boxes hold 5 * 6 = 30 eggs.</step_1><copied/> "
            "<step_2>Without the broken ones that is 30 - 4 = 26 eggs.</step_2><corrected/> "
            "<step_3>Half of them are left: 26 / 2 = 13 eggs.</step_3><continued/> "
            "<answer>13</answer><verdict>incorrect</verdict>"
        )
        return Generation(text, FinishReason.STOP, **api_docs.RESPONSE_EXAMPLE["usage"])


def test_the_example_critique_is_the_answer_to_the_example_request() -> None:
    async def main() -> CritiqueResponse:
        backend = Quoting("critic-4b", lambda question, attempt: "", "5c2f0e8a91d3b764")
        service = CriticService(backend, "chat-v1", settings="0b61e7f2c49d8a35")
        service.lifecycle.begin()
        await asyncio.sleep(0)
        return await service.critique(CritiqueRequest(**api_docs.REQUEST_EXAMPLE))

    answered = asyncio.run(main()).model_dump(mode="json")
    expected = json.loads(json.dumps(api_docs.RESPONSE_EXAMPLE))
    for differing in (answered, expected):
        del differing["id"], differing["critic"]["backend"]
    assert answered == expected
