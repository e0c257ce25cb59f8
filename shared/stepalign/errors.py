"""Typed errors. Each message says how to go on.

::

    StepalignError
    ├── ConfigError            a configuration that cannot be run
    ├── ProblemFileError       rows of problem files that are refused, by file and line
    ├── PromptError            a prompt template or a prompt over its token budget
    │   ├── PromptTooLongError
    │   └── ContentError       a text that the tokenizer could only write with a control token
    ├── UnusableRolloutError   a rollout that no update can use: it is skipped and counted
    ├── QueueError
    │   ├── QueueUnavailableError   the Redis server cannot be reached
    │   ├── UnsupportedServerError  the Redis server is older than 7.0 or is misconfigured for work
    │   ├── CorruptEntryError       an entry that is no rollout of this schema version
    │   └── EntryTooLargeError      a rollout over the size of an entry
    ├── CriticError            a call of the critic that gave no critique at all
    │   ├── CriticUnavailableError  not reachable, loading, draining or saturated: try again
    │   └── CriticRequestError      the service refused the request: do not try again
    ├── GraderError            the grader failed: the answer is neither right nor wrong
    ├── NonFiniteError         NaN or infinity in an update, which was not applied
    ├── PolicyError            an adapter that is missing or has a wrong checksum
    ├── CheckpointError        a checkpoint that is torn, corrupt or of another run
    ├── JournalError           a record of published rollouts that cannot be written
    ├── ProcessFailedError     a supervised process ended with an error
    └── NothingTrainedError    a run to its end in which every rollout was skipped
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import ClassVar, NamedTuple


class StepalignError(Exception):
    """Base of every error that stepalign raises on purpose."""

    exit_code: ClassVar[int] = 1
    """Of a process that ends with this error. 1: it would end so again; ``os.EX_TEMPFAIL``: the cause may pass."""


class ConfigError(StepalignError):
    """A configuration that cannot be run."""


class RefusedRow(NamedTuple):
    """A refused row of a problem file, or the whole file with ``number`` 0."""

    number: int
    """Counted from 1."""
    reason: str
    unit: str = "line"
    """What is counted: lines, or the rows of a file that has no lines."""
    file: str = ""
    """The file in the folder that was read; empty where a file was."""


class ProblemFileError(StepalignError):
    """Problem files with rows that are refused. ``stopped``: there may be more of them, which were not read."""

    def __init__(self, path: str, rows: Sequence[RefusedRow], *, stopped: bool = False) -> None:
        self.path = path
        self.rows = list(rows)
        self.stopped = stopped
        places: dict[tuple[str, str, str], list[int]] = {}
        for row in rows:
            places.setdefault((row.file, row.unit, row.reason), []).append(row.number)
        shown = [_told(*key, numbers) for key, numbers in list(places.items())[:_SHOWN_REASONS]]
        if len(places) > _SHOWN_REASONS:
            shown.append(f"… and {len(places) - _SHOWN_REASONS} other reasons")
        if stopped:
            shown.append(f"the rest was not read after {len(rows)} refused rows")
        super().__init__("\n  ".join([f"{path} was refused and nothing was run:", *shown]))


_SHOWN_REASONS, _SHOWN_ROWS = 20, 5


def _told(file: str, unit: str, reason: str, numbers: list[int]) -> str:
    """One reason with the rows that it holds for."""
    if not any(numbers):
        return f"{file}: {reason}" if file else reason
    listed = ", ".join(map(str, numbers[:_SHOWN_ROWS]))
    more = f" and {len(numbers) - _SHOWN_ROWS} more" if len(numbers) > _SHOWN_ROWS else ""
    place = f"{unit}{'s' if len(numbers) > 1 else ''} {listed}{more}"
    return f"{file}, {place}: {reason}" if file else f"{place}: {reason}"


class PromptError(StepalignError):
    """A prompt template that cannot be filled or rendered."""


class PromptTooLongError(PromptError):
    """A prompt over its token budget. Prompts are never cut: a cut prompt loses the problem and keeps the rest."""

    def __init__(self, what: str, tokens: int, budget: int, setting: str) -> None:
        self.tokens = tokens
        self.budget = budget
        super().__init__(f"{what} has {tokens} tokens, over its budget of {budget}; raise {setting} or leave it out")


class ContentError(PromptError):
    """A text with a part that only a control token of the tokenizer stands for."""


class UnusableReason(StrEnum):
    """Why a rollout cannot be used. The ledger, the metrics and the log name it so."""

    TEXT_IS_NOT_ITS_TOKENS = "text_is_not_its_tokens"
    """The text is not the decoding of the token ids."""
    UNKNOWN_TOKENS = "unknown_tokens"
    """Token ids that the model has no embedding for."""
    TOO_LONG_FOR_THE_MODEL = "too_long_for_the_model"
    """More tokens, under the longer of the two prompts, than the model has positions."""
    CRITIQUE_IS_OF_ANOTHER_TEXT = "critique_is_of_another_text"
    """The critique's first difference is no step and no answer of the rollout."""
    TEACHER_PROMPT_TOO_LONG = "teacher_prompt_too_long"
    TEACHER_PROMPT_UNWRITABLE = "teacher_prompt_unwritable"
    """The context holds text that the tokenizer could only write with a control token."""


class UnusableRolloutError(StepalignError):
    """A rollout that no update can use, whoever sampled it. It is skipped under its reason, and the run goes on."""

    def __init__(self, reason: UnusableReason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class QueueError(StepalignError):
    """Base of the queue's errors."""


class QueueUnavailableError(QueueError):
    """The Redis server cannot be reached."""

    exit_code = os.EX_TEMPFAIL


class UnsupportedServerError(QueueError):
    """The server is older than Redis 7.0 or its settings would lose work."""


class CorruptEntryError(QueueError):
    """A queue entry that is no rollout of this schema version."""


class EntryTooLargeError(QueueError, ValueError):
    """A rollout that takes more bytes than an entry of the queue may."""


class CriticError(StepalignError):
    """A call of the critic that gave no critique and no typed failure."""


class CriticUnavailableError(CriticError):
    """The critic is not reachable, loading, draining or saturated: ``retry_after`` in seconds, ``code`` its own."""

    exit_code = os.EX_TEMPFAIL

    def __init__(self, message: str, retry_after: float | None = None, code: str | None = None) -> None:
        self.retry_after = retry_after
        self.code = code
        super().__init__(message)


class CriticRequestError(CriticError):
    """The critic refused the request; the same request will be refused again."""

    def __init__(self, message: str, status: int, code: str | None = None) -> None:
        self.status = status
        self.code = code
        super().__init__(message)


class GraderError(StepalignError):
    """The grader failed on an answer, which is then neither right nor wrong."""


class NonFiniteError(StepalignError):
    """NaN or infinity in an update or in a policy. Such an update is not applied: the last good step's weights stay."""


class PolicyError(StepalignError):
    """An adapter version that is missing or does not match its checksum."""


class CheckpointError(StepalignError):
    """A checkpoint that is torn, corrupt or belongs to another run."""


class JournalError(StepalignError):
    """The record of published rollouts cannot be written."""


class ProcessFailedError(StepalignError):
    """A supervised process ended with an error."""


class NothingTrainedError(StepalignError):
    """A run to its end that has trained nothing. ``skipped`` counts its rollouts by reason."""

    def __init__(self, run: str, published: int, skipped: Mapping[str, int]) -> None:
        reasons = (
            ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items())) or "for no reason on record"
        )
        super().__init__(
            f"run {run!r} has trained nothing: all of its {published} rollouts were skipped ({reasons}); with "
            "--allow-untrained that is no failure"
        )
