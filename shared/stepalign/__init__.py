"""stepalign: the SDK. Wire types, the trace parser, the alignment validator, the critic client and the queue."""

from stepalign.critique.alignment import validate_critique
from stepalign.critique.trace import Trace, parse_trace, render_trace
from stepalign.types import (
    Critique,
    CritiqueFailure,
    CritiqueRequest,
    CritiqueResponse,
    FailureReason,
    FinishReason,
    Problem,
    Verdict,
)

__all__ = [
    "Critique",
    "CritiqueFailure",
    "CritiqueRequest",
    "CritiqueResponse",
    "FailureReason",
    "FinishReason",
    "Problem",
    "Trace",
    "Verdict",
    "parse_trace",
    "render_trace",
    "validate_critique",
]
