"""Every sequence of token ids has spans, whatever its tokenizer decodes by."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stepalign.critique.trace import Span
from stepalign_lab.smollm2 import find_gguf
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.spans import token_spans
from support.model_tokenizers import KINDS

BYTE_FALLBACK = ("gemma", "llama2")


@pytest.fixture(scope="module", params=[*KINDS, "SmolLM2 itself"])
def model_tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param in KINDS:
        return KINDS[request.param]()
    return AutoTokenizer.from_pretrained(find_gguf().parent, gguf_file=find_gguf().name)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """As the solver decodes."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def rollout_of_ids(tokenizer: Any, ids: list[int], finish: str = "length") -> Rollout:
    content = ids if finish == "length" else ids[:-1]
    return Rollout.model_validate(
        {
            "run_id": "test",
            "rollout_id": "r0",
            "group_id": "g0",
            "problem": {"id": "p0", "question": "?", "answer": "1"},
            "policy_version": 0,
            "prompt_token_ids": [1],
            "completion_token_ids": ids,
            "text": decoded(tokenizer, content),
            "finish_reason": finish,
            "sampling": {"max_new_tokens": 64, "seed": 0},
        }
    )


def bytes_of(tokenizer: Any) -> list[int]:
    """The ids that stand for one byte each."""
    if tokenizer.convert_tokens_to_ids("<0xFF>") != tokenizer.unk_token_id and "<0xFF>" in tokenizer.get_vocab():
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)]
    return [i for token, i in tokenizer.get_vocab().items() if len(token) == 1]


def assert_covering(spans: list[Span], rollout: Rollout) -> None:
    """One span a token, in order, without gaps; neighbours share a span or do not overlap."""
    assert len(spans) == len(rollout.completion_token_ids)
    reached = 0
    for before, span in zip([(0, 0), *spans], spans, strict=False):
        assert span == before or span[0] == reached
        reached = span[1]
    assert reached == len(rollout.text)


def assert_precise(spans: list[Span], rollout: Rollout, tokenizer: Any) -> None:
    """No span crosses a place up to which the ids decode to whole characters of the text: decoded from the first id
    each time, which the code does not."""
    ids = rollout.completion_token_ids
    for i in range(1, len(ids)):
        text = decoded(tokenizer, ids[:i])
        if rollout.text.startswith(text) and not text.endswith("\ufffd"):
            assert spans[i - 1][1] <= len(text) <= spans[i][0], (i, text)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, list[float]]:
    """The share of byte tokens, and a number for each token; both become ids of the tokenizer at hand."""
    return draw(st.sampled_from([0, 1, 2])), draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=24))


@settings(max_examples=150, deadline=None)
@given(sequence=sequences(), stopped=st.booleans())
def test_spans_cover_the_text_of_any_ids(
    model_tokenizer: Any, sequence: tuple[int, list[float]], stopped: bool
) -> None:
    """Special and added tokens, bytes that are no character, ids past the end of the vocabulary (padded embeddings)."""
    half_bytes, places = sequence
    own = bytes_of(model_tokenizer)
    anything = range(len(model_tokenizer) + 16)
    ids = [
        own[int(place * len(own))]
        if half_bytes == 2 or (half_bytes == 1 and i % 2)
        else anything[int(place * len(anything))]
        for i, place in enumerate(places)
    ]
    ids = [*ids, model_tokenizer.eos_token_id] if stopped else ids
    rollout = rollout_of_ids(model_tokenizer, ids, "stop" if stopped else "length")
    spans = token_spans(rollout, model_tokenizer)
    assert_covering(spans, rollout)
    if not stopped:
        assert_precise(spans, rollout, model_tokenizer)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="aé你😀 \n\t01<>=\u200d\x00\ufffd", max_size=30), cut=st.integers(0, 3))
def test_spans_of_a_written_text_are_its_tokens(model_tokenizer: Any, text: str, cut: int) -> None:
    """Leading spaces, NUL, a U+FFFD that is meant, and an end in the middle of a character."""
    ids = model_tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ids[: max(len(ids) - cut, 0)] or [model_tokenizer.eos_token_id]
    rollout = rollout_of_ids(model_tokenizer, ids)
    spans = token_spans(rollout, model_tokenizer)
    assert_covering(spans, rollout)
    assert_precise(spans, rollout, model_tokenizer)


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_a_broken_byte_breaks_the_right_ones_before_it(kind: str) -> None:
    tokenizer = KINDS[kind]()
    names = ["<0x41>", "<0x42>", "<0xFF>", "<0x43>", "<|end|>"]
    rollout = rollout_of_ids(tokenizer, tokenizer.convert_tokens_to_ids(names))
    # All four bytes of the run are written as U+FFFD: 0xFF alone is no character.
    assert rollout.text == "\ufffd" * 4 + "<|end|>"
    spans = token_spans(rollout, tokenizer)
    assert_covering(spans, rollout)
    assert spans[-1] == (4, 11) and spans[3][1] == 4


def test_a_space_that_the_decoder_takes_off_is_an_empty_span() -> None:
    tokenizer = KINDS["llama2"]()
    rollout = rollout_of_ids(tokenizer, tokenizer.convert_tokens_to_ids(["▁", "7", "▁", "7"]))
    assert rollout.text == "7 7"
    assert token_spans(rollout, tokenizer) == [(0, 0), (0, 1), (1, 2), (2, 3)]


class CountingBackend:
    """A tokenizer's own decoder, and the number of ids that it was given."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.ids = 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        self.ids += len(ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", ["gemma", "qwen"])
@pytest.mark.parametrize("what", ["anything", "broken bytes"])
def test_long_completions_take_work_in_proportion(kind: str, what: str) -> None:
    """A run of broken bytes, too, where the text of each depends on all the others."""
    tokenizer = KINDS[kind]()
    anything = random.Random(0)
    ids = [anything.randrange(len(tokenizer)) for _ in range(10_000)]
    if what == "broken bytes":
        ids = [bytes_of(tokenizer)[-1]] * 10_000
    rollout = rollout_of_ids(tokenizer, ids)
    backend = CountingBackend(tokenizer.backend_tokenizer)
    assert_covering(token_spans(rollout, SimpleNamespace(backend_tokenizer=backend)), rollout)
    assert len(ids) < backend.ids < 600 * len(ids)  # decoding all that came before would be 5,000 times
