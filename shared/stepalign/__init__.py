"""stepalign: the SDK. Another project asks the critic, parses attempts and validates critiques with these names.

================= ====================================================================================================
Ask the critic    :class:`CriticClient`, :class:`SyncCriticClient`, their requests, responses and errors
Read attempts     :func:`split_attempt` and :func:`join_steps`; :func:`parse_trace` for the step-tagged grammar
Check critiques   :func:`validate_critique`; :func:`answers_equal`, and :func:`load_grader` for others
Problems, prompts :func:`load_problems`, :func:`load_prompt`, :func:`render_token_ids`
Grade solutions   :func:`grade`
================= ====================================================================================================
"""

# A plain import: the client (asyncio, httpx, anyio) adds 75 ms to the 95 ms of pydantic and the types, and most callers
# want it. Exports on demand would hide these names from readers and tools.
from stepalign.client import CriticClient, SyncCriticClient
from stepalign.critique.alignment import validate_critique
from stepalign.critique.answers import answers_equal
from stepalign.critique.splitting import AnswerRule, SplitAttempt, SplitRule, join_steps, split_attempt
from stepalign.critique.trace import TaggedAnswer, TaggedStep, Trace, TraceIssue, parse_trace, render_trace
from stepalign.errors import (
    ConfigError,
    ContentError,
    CriticError,
    CriticRequestError,
    CriticUnavailableError,
    GraderError,
    ProblemFileError,
    PromptError,
    StepalignError,
)
from stepalign.plugins import load_grader
from stepalign.problems import load_problems
from stepalign.prompts import Prompt, load_prompt, prompt_sets, render_token_ids
from stepalign.scoring import GradedSample, grade
from stepalign.types import (
    AlignmentReport,
    AttemptReading,
    CriticIdentity,
    Critique,
    CritiqueBatchItem,
    CritiqueBatchResponse,
    CritiqueFailure,
    CritiqueMode,
    CritiqueRequest,
    CritiqueResponse,
    CritiqueStep,
    ErrorBody,
    ErrorDetail,
    FailureReason,
    FinishReason,
    Forced,
    ModelInfo,
    ModelList,
    Problem,
    StepStatus,
    Usage,
    Verdict,
)

__all__ = [
    "AlignmentReport",
    "AnswerRule",
    "AttemptReading",
    "ConfigError",
    "ContentError",
    "CriticClient",
    "CriticError",
    "CriticIdentity",
    "CriticRequestError",
    "CriticUnavailableError",
    "Critique",
    "CritiqueBatchItem",
    "CritiqueBatchResponse",
    "CritiqueFailure",
    "CritiqueMode",
    "CritiqueRequest",
    "CritiqueResponse",
    "CritiqueStep",
    "ErrorBody",
    "ErrorDetail",
    "FailureReason",
    "FinishReason",
    "Forced",
    "GradedSample",
    "GraderError",
    "ModelInfo",
    "ModelList",
    "Problem",
    "ProblemFileError",
    "Prompt",
    "PromptError",
    "SplitAttempt",
    "SplitRule",
    "StepStatus",
    "StepalignError",
    "SyncCriticClient",
    "TaggedAnswer",
    "TaggedStep",
    "Trace",
    "TraceIssue",
    "Usage",
    "Verdict",
    "answers_equal",
    "grade",
    "join_steps",
    "load_grader",
    "load_problems",
    "load_prompt",
    "parse_trace",
    "prompt_sets",
    "render_token_ids",
    "render_trace",
    "split_attempt",
    "validate_critique",
]
