from __future__ import annotations

import json

import pytest

from stepalign.errors import CorruptEntryError
from stepalign_run.queue.codec import decode, encode


def test_a_rollout_survives_encoding(make_rollout) -> None:
    rollout = make_rollout(
        text="<step_1>½ × 4 = 2 \u2028\n\x00</step_1>",
        behaviour_logprobs=[-0.1, -1e-30, -12.345678901234567],
    )
    assert decode(encode(rollout)) == rollout


def changed(payload: bytes, **fields: object) -> bytes:
    return json.dumps(json.loads(payload) | fields).encode()


@pytest.mark.parametrize("payload", [b"", b"rollout", b'{"run_id": "a"', b"\xff\xfe"])
def test_bytes_that_are_no_json_say_so(payload: bytes) -> None:
    with pytest.raises(CorruptEntryError, match="not JSON"):
        decode(payload)


def test_another_schema_version_is_named(make_rollout) -> None:
    with pytest.raises(CorruptEntryError, match="schema_version is 2; this program reads 1"):
        decode(changed(encode(make_rollout()), schema_version=2, a_new_field=1))


def test_invalid_fields_are_named_and_their_values_are_not_shown(make_rollout) -> None:
    payload = changed(encode(make_rollout()), policy_version=-7919, completion_token_ids=[], surprise=1)
    with pytest.raises(CorruptEntryError, match="policy_version") as caught:
        decode(payload)
    assert "completion_token_ids" in str(caught.value)
    assert "surprise" in str(caught.value)
    assert "7919" not in str(caught.value)


def test_json_that_is_no_object_is_corrupt() -> None:
    with pytest.raises(CorruptEntryError, match="rollout"):
        decode(b"[1, 2]")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_log_probability_that_json_cannot_hold_is_refused_before_sending(make_rollout, value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        encode(make_rollout(behaviour_logprobs=[-0.5, value, -0.5]))
