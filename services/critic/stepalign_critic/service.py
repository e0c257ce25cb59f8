"""One request → one validated critique, or a typed failure.

The service splits the attempt, renders the prompt, generates, cuts the thinking and validates the rest. When that
fails, it asks once more and more strictly.

The service knows prompts and alignment; it knows nothing of HTTP and nothing of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import uuid4

from prometheus_client import CollectorRegistry

from stepalign.critique.alignment import in_sent_text, validate_critique
from stepalign.critique.forms import omit_copied_steps, quote_wrong_step
from stepalign.critique.splitting import SplitAttempt, SplitRule
from stepalign.errors import PromptError
from stepalign.prompts import Message, Prompt, has_prompt, load_prompt
from stepalign.types import (
    AttemptReading,
    CriticIdentity,
    Critique,
    CritiqueFailure,
    CritiqueMode,
    CritiqueRequest,
    CritiqueResponse,
    FailureReason,
    Usage,
)
from stepalign_critic.backends.base import Backend, Generation, Measured, RenderedPrompt
from stepalign_critic.errors import ServiceError, TooManyStepsError, UnsupportedRequestError
from stepalign_critic.lifecycle import Lifecycle
from stepalign_run.logging import get_logger

NO_REFERENCE = "none"
_THINK, _END_THINK = "<think>", "</think>"
_FIELDS = frozenset({"question", "reference_solution", "attempt", "nonce"})
_RETRY_FIELDS = _FIELDS | {"refused", "reason"}
_MOST_REFUSED_CHARACTERS = 8_000

_log = get_logger(__name__)


@dataclass(frozen=True)
class ModelAnswer:
    """An answer of the model to ``prompt`` (the file's name), as it was read, with its tokens."""

    prompt: str
    outcome: Critique | CritiqueFailure
    prompt_tokens: int
    completion_tokens: int


class CriticService:
    """Critiques attempts with ``backend`` and the prompt ``critique`` of the set ``prompts_version``.

    Where the set has a prompt ``critique_retry``, a refused answer is asked for once more with it: it shows the critic
    its answer and why it was refused. Attempts of more than ``max_steps`` steps are refused. Raises PromptError when
    there is no prompt ``critique``, or when one asks for a field that no request can fill.

    ``on_answer`` is called with every answer of the model, those too that no response will hold.
    """

    def __init__(self, backend: Backend, prompts_version: str, max_steps: int = 1000) -> None:
        self._backend = backend
        self._max_steps = max_steps
        self.on_answer: Callable[[ModelAnswer], None] = lambda _: None
        self._prompt = _load(prompts_version, "critique", _FIELDS)
        again = has_prompt(prompts_version, "critique_retry")
        self._retry_prompt = _load(prompts_version, "critique_retry", _RETRY_FIELDS) if again else None
        self._shaping: str | None = None
        self.lifecycle = Lifecycle(backend)

    def identity(self) -> CriticIdentity:
        """The identity of the critic. Raises NotReadyError until the backend started."""
        return self._backend.identity(self._prompt.version)

    def shaping(self) -> str:
        """A digest of identity and prompts. Raises NotReadyError until the backend started."""
        if self._shaping is None:
            prompts = (self._prompt, self._retry_prompt)
            texts = [None if prompt is None else prompt.messages for prompt in prompts]
            content = json.dumps({"identity": self.identity().model_dump(mode="json"), "prompts": texts})
            self._shaping = hashlib.sha256(content.encode()).hexdigest()
        return self._shaping

    def engine_registry(self) -> CollectorRegistry | None:
        """The metrics of the backend's engine; None where it has none."""
        return self._backend.registry if isinstance(self._backend, Measured) else None

    def messages(self, request: CritiqueRequest) -> list[Message]:
        """The prompt's messages. The same request gives the same messages, its nonce included."""
        return _fill(self._prompt, _values(request, request.split()))

    async def critique(self, request: CritiqueRequest) -> CritiqueResponse:
        """Answer one request. Raises ServiceError or PromptTooLongError when there is no answer of the backend."""
        refusal = self.lifecycle.refusal()
        if refusal is not None:
            raise refusal
        split = request.split()
        if len(split.steps) > self._max_steps:
            raise TooManyStepsError(
                f"the attempt has {len(split.steps)} steps by the rule {split.rule.value!r}, the limit is "
                f"{self._max_steps}; send fewer, longer ones, or mark the steps with tags"
            )
        values = _values(request, split)
        answers = [await self._ask(request, split, self._prompt, values)]
        refused = answers[0].outcome
        if isinstance(refused, CritiqueFailure) and refused.reason is not FailureReason.TRUNCATED:
            answers += await self._ask_again(request, split, values, answers[0], refused)
        outcome = answers[-1].outcome
        critique = in_sent_text(outcome, split) if isinstance(outcome, Critique) else None
        return CritiqueResponse(
            id=new_id(),
            attempt=reading_of(split),
            critique=critique,
            failure=outcome if isinstance(outcome, CritiqueFailure) else None,
            context=context_of(outcome, split.tagged, request.mode) if isinstance(outcome, Critique) else None,
            retried=refused.reason if isinstance(refused, CritiqueFailure) and len(answers) > 1 else None,
            critic=self.identity(),
            usage=Usage(
                prompt_tokens=sum(answer.prompt_tokens for answer in answers),
                completion_tokens=sum(answer.completion_tokens for answer in answers),
            ),
        )

    async def _ask_again(
        self,
        request: CritiqueRequest,
        split: SplitAttempt,
        values: dict[str, str],
        first: ModelAnswer,
        refused: CritiqueFailure,
    ) -> list[ModelAnswer]:
        """The answer to the stricter prompt; none where there is no such prompt or the backend will never answer it.

        Raises errors that pass, such as SaturatedError: a busy engine must not change the answer to a request. They
        tell why the ``first`` answer was refused and what it took, which no response will.
        """
        if self._retry_prompt is None:
            return []
        _log.info(
            "the answer is refused; asking again",
            reason=refused.reason,
            detail=refused.detail,
            prompt_tokens=first.prompt_tokens,
            completion_tokens=first.completion_tokens,
        )
        # Many servers take no empty turn.
        said = refused.text[:_MOST_REFUSED_CHARACTERS].strip() or "(nothing)"
        told = {"refused": said, "reason": refused.detail}
        try:
            return [await self._ask(request, split, self._retry_prompt, values | told)]
        except (PromptError, UnsupportedRequestError) as error:
            _log.warning("the stricter prompt cannot be answered", error=str(error))
            return []
        except ServiceError as error:
            raise error.extended(
                f"a first answer was refused: {refused.reason.value}, {refused.detail} (it took {first.prompt_tokens} "
                f"prompt tokens and {first.completion_tokens} completion tokens)"
            ) from error

    async def _ask(
        self, request: CritiqueRequest, split: SplitAttempt, prompt: Prompt, values: dict[str, str]
    ) -> ModelAnswer:
        messages = _fill(prompt, values)
        generation = await self._backend.generate(RenderedPrompt(request, messages, self._backend.render(messages)))
        outcome = read_answer(generation, split.tagged, request.answer)
        answer = ModelAnswer(prompt.name, outcome, generation.prompt_tokens, generation.completion_tokens)
        self.on_answer(answer)
        return answer


def new_id() -> str:
    """An id for a response."""
    return f"crq_{uuid4().hex}"


def _load(version: str, name: str, fields: frozenset[str]) -> Prompt:
    prompt = load_prompt(version, name)
    unknown = prompt.fields - fields
    if unknown:
        raise PromptError(f"prompt {version}/{name} asks for {sorted(unknown)}; known: {sorted(fields)}")
    return prompt


def _values(request: CritiqueRequest, split: SplitAttempt) -> dict[str, str]:
    shown_values = {
        "question": request.question,
        "reference_solution": NO_REFERENCE if request.reference_solution is None else request.reference_solution,
        "attempt": split.tagged,
    }
    # A digest of the shown text, so that the mode changes no prompt. It is too long for an attempt that holds its own.
    shown = "\x1f".join(shown_values.values())
    return {**shown_values, "nonce": hashlib.sha256(shown.encode()).hexdigest()[:16]}


def _fill(prompt: Prompt, values: dict[str, str]) -> list[Message]:
    return prompt.fill(**{name: values[name] for name in prompt.fields})


def reading_of(split: SplitAttempt) -> AttemptReading:
    """The response's account of the split."""
    return AttemptReading(
        rule=split.rule,
        steps=list(split.steps),
        answer=split.answer,
        answer_rule=split.answer_rule,
        tagged=None if split.rule is SplitRule.TAGS else split.tagged,
    )


def context_of(critique: Critique, attempt: str, mode: CritiqueMode) -> str:
    """The context of a critique of the tagged ``attempt``, its span not yet in the sent text."""
    match mode:
        case CritiqueMode.STEP_ALIGNED:
            return critique.text
        case CritiqueMode.FULL_REPETITION:
            return quote_wrong_step(critique, attempt)
        case CritiqueMode.OMISSION:
            return omit_copied_steps(critique)


def read_answer(generation: Generation, attempt: str, known_answer: str | None) -> Critique | CritiqueFailure:
    """A backend's text → the critique that follows its thinking, validated against the tagged attempt.

    Thinking ends at the last ``</think>``. Where the attempt itself holds that tag, a copy of it holds it too. Then the
    first valid text is taken, of these: the text after the last tag, after the one before it and so on, and all of it.
    A failure's detail ends in the backend's remark, if there is one.
    """
    read = _read_text(generation, attempt, known_answer)
    if isinstance(read, Critique) or generation.remark is None:
        return read
    return read.model_copy(update={"detail": f"{read.detail}; {generation.remark}"})


def _read_text(generation: Generation, attempt: str, known_answer: str | None) -> Critique | CritiqueFailure:
    read: Critique | CritiqueFailure | None = None
    for answer in _answers(generation.text, attempt):
        read = validate_critique(
            answer, attempt, known_answer=known_answer, critic_finish_reason=generation.finish_reason
        )
        if isinstance(read, Critique):
            return read
    if read is None:
        return CritiqueFailure(
            reason=FailureReason.TRUNCATED, detail="the critic's thinking never ended", text=generation.text
        )
    return read


def _answers(text: str, attempt: str) -> Iterator[str]:
    """The parts of ``text`` that may be the answer; none when all of it is thinking."""
    before, ended, answer = text.rpartition(_END_THINK)
    if ended:
        yield answer
        while _END_THINK in attempt and _END_THINK in before:
            before = before.rpartition(_END_THINK)[0]
            yield text[len(before) + len(_END_THINK) :]
    if not text.lstrip().startswith(_THINK) and (not ended or _END_THINK in attempt):
        yield text
