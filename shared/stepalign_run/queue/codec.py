"""Rollout ↔ bytes: the JSON of the wire type. Uncompressed: zlib costs more time than the bytes are worth here."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from stepalign.errors import CorruptEntryError, EntryTooLargeError
from stepalign.types import SCHEMA_VERSION
from stepalign_run.rollout import Rollout


def encode(rollout: Rollout) -> bytes:
    """The fields of a rollout hold nothing that JSON cannot."""
    return rollout.model_dump_json().encode()


def decode(payload: bytes) -> Rollout:
    """Raises CorruptEntryError, saying in which of three ways the bytes are no rollout."""
    try:
        return Rollout.model_validate_json(payload)
    except ValidationError as error:
        raise CorruptEntryError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return f"not JSON: {first['msg']}"
    for problem in problems:
        if problem["loc"] == ("schema_version",):
            return f"schema_version is {problem['input']!r}; this program reads {SCHEMA_VERSION}"
    shown = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'rollout'}: {item['msg']}" for item in problems[:5])
    return f"invalid fields: {shown}"


def encode_group(group: Sequence[Rollout], capacity: int, max_entry_bytes: int) -> dict[str, bytes]:
    """Encode a group, by rollout id.

    Raises ValueError for a group that a queue could never admit, and EntryTooLargeError, which is one too.
    """
    if not group:
        raise ValueError("a group holds at least one rollout")
    if len({rollout.group_id for rollout in group}) > 1:
        raise ValueError("the rollouts of a group share one group_id")
    if len(group) > capacity:
        raise ValueError(f"a group of {len(group)} never fits; raise queue.capacity, which is {capacity}")
    payloads = {rollout.rollout_id: encode(rollout) for rollout in group}
    if len(payloads) < len(group):
        raise ValueError(f"group {group[0].group_id} holds a rollout_id twice")
    for rollout_id, payload in payloads.items():
        if len(payload) > max_entry_bytes:
            raise EntryTooLargeError(
                f"rollout {rollout_id} takes {len(payload)} bytes; raise queue.max_entry_bytes, which is "
                f"{max_entry_bytes}, or lower solver.max_new_tokens"
            )
    return payloads
