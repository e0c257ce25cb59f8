"""What llama.cpp's server takes and how it answers, for real: Qwen2.5-Coder-0.5B. `make test-qwen` runs it.

docs/openai-servers.md says the same in words.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.stacks import stepalign

QUESTION = {"role": "user", "content": "Is 7 a prime number? Answer in one word."}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str]]:
    """Address and model of `stepalign lab llama-server`."""
    model = Path(os.environ["QWEN_GGUF"])
    command = stepalign("lab", "llama-server", str(model), "--port", "0", "--threads", "1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = next((m for line in process.stdout if (m := re.fullmatch(r"(\S+) is at (http\S+/v1)\n", line))), None)
        assert found is not None, "the server ended"
        try:
            yield found[2], found[1]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0


def ask(server: tuple[str, str], *messages: dict[str, str], **fields: Any) -> httpx.Response:
    body = {"model": server[1], "messages": messages or [QUESTION], "temperature": 0, "max_tokens": 16, **fields}
    return httpx.post(f"{server[0]}/chat/completions", json=body, timeout=300)


def choice(server: tuple[str, str], *messages: dict[str, str], **fields: Any) -> dict[str, Any]:
    return ask(server, *messages, **fields).raise_for_status().json()["choices"][0]


def test_it_lists_the_model_by_its_files_name(server: tuple[str, str]) -> None:
    (listed,) = httpx.get(f"{server[0]}/models").json()["data"]
    assert listed["id"] == server[1] == "qwen2.5-coder-0.5b-instruct-q4_k_m"


def test_a_grammar_decides_and_a_broken_one_is_refused(server: tuple[str, str]) -> None:
    assert choice(server, grammar='root ::= "zebra crossing"')["message"]["content"] == "zebra crossing"
    broken = ask(server, grammar="root ::= (")
    assert broken.status_code == 400 and "grammar" in broken.json()["error"]["message"]


def test_logprobs_are_the_models_own_before_the_grammar(server: tuple[str, str]) -> None:
    (free, *_), (forced, *_) = (
        choice(server, logprobs=True, top_logprobs=3, **grammar)["logprobs"]["content"]
        for grammar in ({}, {"grammar": 'root ::= "zebra crossing"'})
    )
    assert forced["token"].startswith("z") and forced["logprob"] < -10
    tops = [[one["token"] for one in token["top_logprobs"]] for token in (free, forced)]
    assert tops[0][:2] == tops[1][:2] and forced["token"] not in tops[1]
    after = choice(server, logprobs=True, post_sampling_probs=True, grammar='root ::= "zebra crossing"')
    assert after["logprobs"]["content"][0]["prob"] == 1.0


def test_an_assistants_last_message_is_continued_and_comes_back_in_front(server: tuple[str, str]) -> None:
    begun = {"role": "assistant", "content": "<step_1>7"}
    made = choice(server, QUESTION, begun, grammar='root ::= " is odd.</step_1>"', logprobs=True)
    assert made["message"]["content"] == "<step_1>7 is odd.</step_1>"
    assert "".join(token["token"] for token in made["logprobs"]["content"]) == " is odd.</step_1>"


def test_control_tokens_in_a_message_are_parsed(server: tuple[str, str]) -> None:
    """A text can close its message: nothing in the protocol forbids it to."""
    asked = {name: {"role": "user", "content": name} for name in ("hi", "hi<|im_end|>")}
    counts = [ask(server, message, max_tokens=1).json()["usage"]["prompt_tokens"] for message in asked.values()]
    assert counts[1] == counts[0] + 1
