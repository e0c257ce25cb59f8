"""One request → one validated critique, or a typed failure.

The service splits the attempt, renders the prompt, generates, cuts the thinking and validates the rest. When that
fails, it asks once more and more strictly.

The service knows prompts and alignment; it knows nothing of HTTP and nothing of models.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex

from prometheus_client import CollectorRegistry

from stepalign.critique.alignment import in_sent_text, validate_critique
from stepalign.critique.answers import Grader, Judgement, answers_equal, judged
from stepalign.critique.forms import omit_copied_steps, quote_wrong_step
from stepalign.critique.splitting import SplitAttempt
from stepalign.critique.trace import parse_trace
from stepalign.errors import ConfigError, PromptError, PromptTooLongError
from stepalign.prompts import Message, Prompt, has_prompt, load_prompt
from stepalign.prompts.layout import load_layout
from stepalign.types import (
    AttemptReading,
    CriticIdentity,
    Critique,
    CritiqueFailure,
    CritiqueMode,
    CritiqueRequest,
    CritiqueResponse,
    FailureReason,
    FinishReason,
    Forced,
    Usage,
)
from stepalign_critic.backends.base import Aligning, Alignment, Backend, Measured, RenderedPrompt
from stepalign_critic.decoding.conversation import Conversation, TurnPrompts
from stepalign_critic.decoding.plan import WRONG_THRESHOLD, Plan
from stepalign_critic.errors import (
    EngineError,
    EngineTimeoutError,
    SaturatedError,
    ServiceError,
    TooManyStepsError,
    UnsupportedRequestError,
)
from stepalign_critic.free_answers import read_answer
from stepalign_critic.judging import Judge
from stepalign_critic.known_attempts import LEAST_T, KnownPair, known_pairs, separates, separation
from stepalign_critic.lifecycle import Lifecycle
from stepalign_run.logging import get_logger

NO_REFERENCE = "none"
_FIELDS = frozenset({"question", "reference_solution", "attempt", "nonce", "turn", "known"})
_RETRY_FIELDS = _FIELDS | {"refused", "reason"}
_MOST_REFUSED_CHARACTERS = 8_000
_ASK_AGAIN_SECONDS = 2.0

_log = get_logger(__name__)


@dataclass(frozen=True)
class AlignedDecoding:
    """Critiques are decoded by a plan: ``budget`` tokens for each; what the known answer narrows.

    With ``trusts_answers`` a right answer clears an attempt's steps, and a wrong one convicts one of them. With
    ``checked``, a critic that does not tell right steps from wrong ones does not start. A step is wrong with a
    probability over ``threshold``, where no answer settles it.
    """

    budget: int
    trusts_answers: bool = True
    checked: bool = False
    threshold: float = WRONG_THRESHOLD


@dataclass(frozen=True)
class ModelAnswer:
    """An answer of the model to ``prompt`` (the file's name), as it was read, with its tokens."""

    prompt: str
    outcome: Critique | CritiqueFailure
    prompt_tokens: int
    completion_tokens: int
    p_wrong: tuple[float, ...] | None = None
    forced: tuple[Forced, ...] = ()


class CriticService:
    """Critiques attempts with ``backend`` and the prompt ``critique`` of the set ``prompts_version``.

    Where the set has a prompt ``critique_retry``, a refused answer is asked for once more with it: it shows the critic
    its answer and why it was refused. Attempts of more than ``max_steps`` steps are refused. Raises PromptError when
    there is no prompt ``critique``, or when one asks for a field that no request can fill.

    With ``aligned``, a backend that can decodes by a plan, and its critiques cannot fail for their form: then nothing
    is asked twice. Their text is validated all the same.

    ``settings`` is the digest of the settings in its identity.

    ``grader`` compares answers, in threads of its own where it may take seconds (:mod:`.judging`).

    ``on_answer`` is called with every answer of the model, those too that no response will hold, and
    ``judge.on_unknown`` for every comparison of answers that the grader could not decide.
    """

    def __init__(
        self,
        backend: Backend,
        prompts_version: str,
        max_steps: int = 1000,
        grader: Grader = answers_equal,
        *,
        aligned: AlignedDecoding | None = None,
        settings: str | None = None,
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._grader = grader
        self.judge = Judge(grader)
        self._max_steps = max_steps
        self._aligning = backend if isinstance(backend, Aligning) and backend.aligns else None
        self._aligned = aligned if self._aligning is not None else None
        self._layout = load_layout(prompts_version) if self._aligned is not None else None
        turns = self._layout is not None and self._layout.form == "turns"
        self._turns = TurnPrompts.load(prompts_version) if turns else None
        self.on_answer: Callable[[ModelAnswer], None] = lambda _: None
        self._prompt = _load(prompts_version, "critique", _FIELDS)
        again = has_prompt(prompts_version, "critique_retry")
        self._retry_prompt = _load(prompts_version, "critique_retry", _RETRY_FIELDS) if again else None
        self._shaping: str | None = None
        self.lifecycle = Lifecycle(backend)
        if self._aligned is not None and self._aligned.checked:
            self.lifecycle.check = self._check

    def identity(self) -> CriticIdentity:
        """The identity of the critic. Raises NotReadyError until the backend started."""
        return self._backend.identity(self._prompt.version).model_copy(update={"settings": self._settings})

    def shaping(self) -> str:
        """A digest of identity and prompts. Raises NotReadyError until the backend started."""
        if self._shaping is None:
            prompts = [self._prompt, self._retry_prompt, *([] if self._turns is None else self._turns.all)]
            texts = [None if prompt is None else prompt.messages for prompt in prompts]
            layout = None if self._layout is None else self._layout.model_dump()
            identity = self.identity().model_dump(mode="json")
            content = json.dumps({"identity": identity, "prompts": texts, "layout": layout})
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
        answers = await self._answers(request, split)
        refused, outcome = answers[0].outcome, answers[-1].outcome
        p_wrong = answers[-1].p_wrong
        critique = in_sent_text(outcome, split) if isinstance(outcome, Critique) else None
        return CritiqueResponse(
            id=new_id(),
            attempt=reading_of(split),
            critique=critique,
            failure=outcome if isinstance(outcome, CritiqueFailure) else None,
            context=context_of(outcome, split.tagged, request.mode) if isinstance(outcome, Critique) else None,
            retried=refused.reason if isinstance(refused, CritiqueFailure) and len(answers) > 1 else None,
            p_wrong=None if p_wrong is None else list(p_wrong),
            forced=list(answers[-1].forced),
            critic=self.identity(),
            usage=Usage(
                prompt_tokens=sum(answer.prompt_tokens for answer in answers),
                completion_tokens=sum(answer.completion_tokens for answer in answers),
            ),
        )

    async def _answers(self, request: CritiqueRequest, split: SplitAttempt) -> list[ModelAnswer]:
        """The answers of the model, the last of which counts."""
        if self._aligned is not None:
            return [await self._align(request, split)]
        values = _values(request, split)
        first = await self._ask(request, split, self._prompt, values)
        refused = first.outcome
        if isinstance(refused, Critique) or refused.reason is FailureReason.TRUNCATED:
            return [first]
        return [first, *await self._ask_again(request, split, values, first, refused)]

    async def _check(self) -> None:
        """Ask the known attempts of the prompt set. Raises ConfigError when the critic does not tell them apart."""
        pairs = known_pairs(self._prompt.version)
        _log.info("asking known attempts before the first request", pairs=len(pairs))
        asked = [(await self._p_wrong(pair, pair.right), await self._p_wrong(pair, pair.wrong)) for pair in pairs]
        told = [(right, wrong) for right, wrong in asked if right is not None and wrong is not None]
        if len(told) < len(pairs) or not pairs:
            _log.warning("it is not known whether the critic tells right steps from wrong ones", pairs=len(pairs))
            return
        right, wrong = ([p for p, _ in told], [p for _, p in told])
        t = separation(right, wrong)
        said = f"of {len(told)} known pairs it finds the wrong step likelier wrong in {sum(w > r for r, w in told)}"
        if not separates(right, wrong):
            raise ConfigError(
                f"the critic does not tell right steps from wrong ones: {said} (t = {t:.1f}, and {LEAST_T} is needed); "
                "take another model or critic.prompts, or set critic.check_known_attempts = false"
            )
        _log.info("the critic tells right steps from wrong ones", pairs=len(told), t=round(t, 2))

    async def _p_wrong(self, pair: KnownPair, attempt: str) -> float | None:
        """How likely the critic finds the pair's step wrong. With the answer trusted, nothing is written."""
        answer = "0"
        tagged = f"{attempt} <answer> {answer} </answer>"
        request = CritiqueRequest(
            question=pair.question, attempt=tagged, reference_solution=pair.reference_solution, answer=answer
        )
        backend, aligning = self._backend, self._aligning
        assert aligning is not None
        plan, messages = await self.judge.run(lambda grader: self.plan(request, True, grader))
        while True:
            try:
                made = await aligning.align(RenderedPrompt(request, messages, backend.render(messages)), plan)
                return None if made.p_wrong is None else made.p_wrong[pair.step - 1]
            except (SaturatedError, EngineTimeoutError, EngineError) as error:
                if not backend.recovers:
                    raise
                _log.warning("a known attempt got no answer; asking again", error=str(error))
                await asyncio.sleep(error.retry_after or _ASK_AGAIN_SECONDS)
            except (PromptTooLongError, ServiceError) as error:
                _log.warning("a known attempt cannot be asked", error=str(error))
                return None

    def plan(
        self, request: CritiqueRequest, trusts_answers: bool | None = None, grader: Grader | None = None
    ) -> tuple[Plan, list[Message]]:
        """What may be said about the request's attempt, and the messages of the prompt. Needs ``aligned``.

        ``trusts_answers`` and ``grader`` take the place of the service's own.
        """
        aligned, layout, split = self._aligned, self._layout, request.split()
        assert aligned is not None and layout is not None
        values = _values(request, split)
        trusts = aligned.trusts_answers if trusts_answers is None else trusts_answers
        right = _is_right(split, request.answer, self._grader if grader is None else grader)
        conversation = None
        if self._turns is not None:
            steps = [step.body.strip() for step in parse_trace(split.tagged).steps]
            told = request.answer if trusts and right is False else None
            conversation = Conversation(self._turns, layout, values, steps, told)
        plan = Plan(
            split,
            layout,
            known_answer=request.answer,
            answer_is_right=right,
            trusts_answers=trusts,
            budget=aligned.budget,
            threshold=aligned.threshold,
            conversation=conversation,
        )
        return plan, _fill(self._prompt, values) if conversation is None else conversation.asking(0)

    async def _align(self, request: CritiqueRequest, split: SplitAttempt) -> ModelAnswer:
        assert self._aligning is not None
        plan, messages = await self.judge.run(lambda grader: self.plan(request, grader=grader))
        made = await self._aligning.align(RenderedPrompt(request, messages, self._backend.render(messages)), plan)
        outcome = await self.judge.run(lambda grader: _validated(made, split, request.answer, grader))
        answer = ModelAnswer(
            self._prompt.name, outcome, made.prompt_tokens, made.completion_tokens, made.p_wrong, made.forced
        )
        self.on_answer(answer)
        return answer

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
        outcome = await self.judge.run(lambda grader: read_answer(generation, split.tagged, request.answer, grader))
        answer = ModelAnswer(prompt.name, outcome, generation.prompt_tokens, generation.completion_tokens)
        self.on_answer(answer)
        return answer


def _is_right(split: SplitAttempt, known: str | None, grader: Grader) -> Judgement:
    """Whether the attempt's answer is the known one; None when that is unknown or one of them is missing."""
    given = parse_trace(split.tagged).answer
    return None if known is None or given is None else judged(grader, given.body, known)


def _validated(made: Alignment, split: SplitAttempt, known: str | None, grader: Grader) -> Critique | CritiqueFailure:
    reason = FinishReason.LENGTH if made.truncated else FinishReason.STOP
    return validate_critique(made.text, split.tagged, known_answer=known, critic_finish_reason=reason, grader=grader)


def new_id() -> str:
    """An id for a response."""
    return f"crq_{token_hex(16)}"


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
        # Who asks in turns fills these two; a checker reads no prompt.
        "turn": split.tagged,
        "known": "",
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
        tagged=None if split.tagged == split.text else split.tagged,
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
