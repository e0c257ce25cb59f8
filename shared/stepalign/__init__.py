"""stepalign: the SDK. Wire types, the trace parser, the alignment validator, the critic client and the queue."""

from stepalign.alignment import validate_critique
from stepalign.trace import Trace, parse_trace, render_trace
from stepalign.types import (
    Context,
    Critique,
    CritiqueFailure,
    CritiqueRequest,
    CritiqueResponse,
    FailureReason,
    FinishReason,
    Problem,
    Rollout,
    Verdict,
)

__all__ = [
    "Context",
    "Critique",
    "CritiqueFailure",
    "CritiqueRequest",
    "CritiqueResponse",
    "FailureReason",
    "FinishReason",
    "Problem",
    "Rollout",
    "Trace",
    "Verdict",
    "parse_trace",
    "render_trace",
    "validate_critique",
]
