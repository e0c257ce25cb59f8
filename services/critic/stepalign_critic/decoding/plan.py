"""What a critique of one attempt may say: its draft, the place of the first error, and what is still to be written.

The known answer narrows it, where the plan trusts answers and the grader is sure: of an attempt whose answer is right
no step is wrong; one whose answer is wrong has an error, at the step that the critic's model finds likeliest to be
wrong, given that those before it are right. Only where it finds each step surely right is the answer alone wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stepalign.critique.splitting import SplitAttempt
from stepalign.critique.trace import TaggedStep, Trace, parse_trace
from stepalign.prompts import Message
from stepalign.prompts.layout import CritiqueLayout
from stepalign.types import Forced, StepStatus, Verdict
from stepalign_critic.decoding.bounds import answer_is_open, without_begun_tag
from stepalign_critic.decoding.conversation import Conversation
from stepalign_critic.decoding.grammar import Choice, Free, Grammar, Literal, Onward, Sequenced
from stepalign_critic.errors import BudgetTooSmallError

_LONGEST_ANSWER_TOKENS = 48
_FURTHER_STEPS = 6
"""How many steps more than the attempt a critique may take to its answer, where its budget allows it."""
_MOST_STEPS = 48
"""Steps that a grammar has room for; the writers of grammars recurse into each."""
_SURELY_RIGHT = 0.02
"""A wrong answer, or the step that states it, is alone to blame where each step is wrong with less than this
probability."""
WRONG_THRESHOLD = 0.5
"""The probability over which a step is wrong, unless a plan has one of its own."""
_MOST_LOG_ODDS = 700.0
"""The exponential of more is beyond a float."""
_STEP_TOKENS = 384
"""The most that one step may take, however much is left."""
_SHORTEST_STEP_TOKENS = 16
"""Room for one step, at least. A corrected one may be half as long again as the wrong one."""


class Piece(NamedTuple):
    """A part of the draft. ``step`` is the attempt's step (from 0) that it calls right; None where nothing is decided.

    ``others`` are the words that might stand in its place; without any, every other text might.
    """

    text: str
    step: int | None = None
    others: tuple[str, ...] = ()


class Score(NamedTuple):
    """Natural-log probabilities of a deciding piece: of its tokens, or of the token at which its word parts from the
    other words, and theirs."""

    own: float
    others: tuple[float, ...] = ()


class Place(NamedTuple):
    """Where the critique leaves the attempt: at its step ``step`` (from 0; the number of steps: at the answer)."""

    step: int
    kind: StepStatus | None
    """CORRECTED or INSERTED; None where that is for the critic to write."""


@dataclass(frozen=True)
class Choosing:
    """The model's opinion of each step, what came of it, and what the known answer changed."""

    p_wrong: tuple[float, ...]
    place: Place | None
    overruled: Forced | None


@dataclass(frozen=True)
class Remainder:
    """What is still to be written: ``given`` follows the first ``kept`` pieces of the draft, ``grammar`` follows it.

    ``grammar`` is None when nothing is.
    """

    kept: int
    given: tuple[str, ...]
    grammar: Grammar | None
    open_text: str
    """The part of what is given that belongs to the text that ``Plan.finish`` reads."""
    messages: list[Message] | None = None
    """In a conversation, the messages that ``given`` follows."""


class Finished(NamedTuple):
    """A critique with marks and verdict, and what the known answer settled in it."""

    text: str
    forced: tuple[Forced, ...]


class Plan:
    """The plan for one attempt.

    ``answer_is_right`` compares the attempt's answer with the known one; None when one of them is missing or the
    grader does not know. With ``trusts_answers`` that narrows the place of the error. ``budget`` is the tokens of a
    whole answer. Over ``threshold`` a step is wrong, or missing, where no answer settles it. ``conversation`` belongs
    to the form ``turns``.
    """

    def __init__(
        self,
        split: SplitAttempt,
        layout: CritiqueLayout,
        *,
        known_answer: str | None,
        answer_is_right: bool | None,
        trusts_answers: bool,
        budget: int,
        threshold: float = WRONG_THRESHOLD,
        conversation: Conversation | None = None,
    ) -> None:
        self.conversation = conversation
        self._layout = layout
        self._trace: Trace = parse_trace(split.tagged)
        self.known = known_answer
        self._right = answer_is_right
        self._trusts = trusts_answers
        self._budget = budget
        self._threshold = threshold
        self._last_step_answers = _holds_answer(split)
        self.pieces = self._draft()

    @property
    def steps(self) -> tuple[TaggedStep, ...]:
        return self._trace.steps

    def _draft(self) -> tuple[Piece, ...]:
        layout, pieces = self._layout, list[Piece]()
        if layout.form == "turns":
            others = (layout.wrong,)
            return tuple(Piece(layout.right, i, others) for i in range(len(self.steps)))
        for i, step in enumerate(self.steps):
            if layout.form == "check":
                others = (layout.wrong,) if layout.unjustified is None else (layout.wrong, layout.unjustified)
                pieces.append(Piece(layout.label.format(number=i + 1)))
                pieces.append(Piece(layout.right, i, others))
                pieces.append(Piece("\n"))
                continue
            pieces.append(Piece(_opening(step.number)))
            pieces.append(Piece(step.body, i))
            if step is not self._trace.unfinished:
                pieces.append(Piece(f"</step_{step.number}>{self._after(StepStatus.COPIED)}", i))
        return tuple(pieces)

    def _after(self, mark: StepStatus) -> str:
        """What stands between a step of this mark and the next."""
        layout = self._layout
        return f"{layout.before_mark}<{mark}/>{layout.separator}" if layout.form == "inline" else layout.separator

    def choose(self, scores: Sequence[Score]) -> Choosing:
        """The place of the first error by the scores of the deciding pieces, in the draft's order."""
        wrong, missing = self._probabilities(scores)
        own = self._own_choice(wrong, missing)
        place = own
        if self._right is True and self._trusts and own is not None and own.kind is not StepStatus.INSERTED:
            place = None
        if self._right is False and (place is None or self._trusts):
            place = self._likeliest(wrong) if self._trusts or self._last_step_answers else Place(len(self.steps), None)
        overruled = None
        if place != own:
            overruled = Forced.NO_ERROR if place is None else Forced.ERROR
        return Choosing(tuple(wrong), place, overruled)

    def _probabilities(self, scores: Sequence[Score]) -> tuple[list[float], list[float]]:
        """For each step: P(wrong) and P(a step is missing before it), given that the steps before it are right."""
        deciding = (piece.step for piece in self.pieces if piece.step is not None)
        copied = [0.0] * len(self.steps)
        wrong, missing = [0.0] * len(self.steps), [0.0] * len(self.steps)
        for step, score in zip(deciding, scores, strict=True):
            if not score.others:
                copied[step] += score.own
                wrong[step] = -math.expm1(min(0.0, copied[step]))
                continue
            odds = [math.exp(min(other - score.own, _MOST_LOG_ODDS)) for other in score.others]
            whole = sum(odds, start=1.0)
            wrong[step] = odds[0] / whole
            if len(odds) > 1:
                missing[step] = odds[1] / whole
        return wrong, missing

    def _own_choice(self, wrong: Sequence[float], missing: Sequence[float]) -> Place | None:
        """The first step at which another word than the right one is likely enough."""
        for i, (p_wrong, p_missing) in enumerate(zip(wrong, missing, strict=True)):
            if p_wrong + p_missing > self._threshold:
                inserts = p_missing > p_wrong and self._may_insert
                return Place(i, StepStatus.INSERTED if inserts else self._kind_of_error())
        return None

    @property
    def _may_insert(self) -> bool:
        """Only an attempt that reaches a right answer can lack nothing but a step."""
        return self._trace.answer is not None and self._right is not False

    def _kind_of_error(self) -> StepStatus | None:
        return None if self._layout.form == "inline" and self._may_insert else StepStatus.CORRECTED

    def _likeliest(self, wrong: Sequence[float]) -> Place:
        """The likeliest error of an attempt whose answer is wrong."""
        step = max(range(len(wrong)), key=wrong.__getitem__, default=None)
        if step is not None and wrong[step] >= _SURELY_RIGHT:
            return Place(step, StepStatus.CORRECTED)
        last = len(self.steps) - 1
        return Place(last, StepStatus.CORRECTED) if self._last_step_answers else Place(last + 1, None)

    def remainder(self, place: Place | None, count: Callable[[str], int]) -> Remainder:
        """What is to be written once the place is chosen. Raises BudgetTooSmallError when it cannot fit.

        ``count`` gives the tokens of a text.
        """
        if place is None or place.step == len(self.steps):
            return self._after_copies(place, count)
        kept = self._pieces_before(place.step)
        step = self.steps[place.step]
        messages = None if self.conversation is None else self.conversation.correcting(place.step)
        given: list[str] = []
        if self._layout.form == "check":
            word = self._layout.unjustified if place.kind is StepStatus.INSERTED else self._layout.wrong
            assert word is not None
            given += [self._layout.label.format(number=place.step + 1), word, "\n"]
        given.append(_opening(step.number))
        room = self._room(kept, given, count)
        if place.kind is StepStatus.INSERTED:
            grammar = Free(min(room, _STEP_TOKENS), f"</step_{step.number}>")
        else:
            least = _SHORTEST_STEP_TOKENS + count(step.body) * 3 // 2
            steps, each = self._shares(room, len(self.steps) - place.step - 1 + _FURTHER_STEPS, least, count)
            grammar = self._corrected(place, step, steps, each, count)
        return Remainder(kept, tuple(given), grammar, _opening(step.number), messages)

    def _corrected(self, place: Place, step: TaggedStep, steps: int, each: int, count: Callable[[str], int]) -> Grammar:
        free = Free(each, f"</step_{step.number}>", unlike=step.body)
        onward = self._onward(step.number + 1, steps, each, StepStatus.CONTINUED)
        corrected = (Literal(self._after(StepStatus.CORRECTED)), onward)
        if place.kind is not None:
            return Sequenced((free, *corrected))
        inserted = Literal(self._after(StepStatus.INSERTED).rstrip())
        return Sequenced((free, Choice((Sequenced(corrected), inserted))))

    def _after_copies(self, place: Place | None, count: Callable[[str], int]) -> Remainder:
        """All steps are copied: then comes what the attempt lacks."""
        unfinished = self._trace.unfinished
        kept = 0 if self.conversation is not None else len(self.pieces)
        if self._trace.answer is not None and (place is None or self.steps):
            return Remainder(kept, (), None, "")
        number = self.steps[-1].number + 1 if self.steps else 1
        first = number if unfinished is None else unfinished.number
        messages = None if self.conversation is None else self.conversation.continuing(first)
        mark = StepStatus.CONTINUED if self._trace.answer is None else StepStatus.INSERTED
        if unfinished is not None:
            given = () if self._layout.form == "inline" else (_opening(unfinished.number), unfinished.body)
            steps, each = self._shares(self._room(kept, given, count), _FURTHER_STEPS + 1, _SHORTEST_STEP_TOKENS, count)
            closing = f"</step_{unfinished.number}>"
            # What begins a tag must not become one.
            begun = re.search(r"<[^<>]*\Z", unfinished.body) is not None
            rest = Choice((Free(each, closing, after_space=begun), Literal(closing)))
            onward = self._onward(unfinished.number + 1, steps, each, mark)
            grammar = Sequenced((rest, Literal(self._after(mark)), onward))
            return Remainder(kept, given, grammar, _opening(unfinished.number) + unfinished.body, messages)
        if self.steps:
            steps, each = self._shares(self._room(kept, (), count), _FURTHER_STEPS + 1, _SHORTEST_STEP_TOKENS, count)
            return Remainder(kept, (), self._onward(number, steps, each, mark), "", messages)
        given = (_opening(1),)
        steps, each = self._shares(self._room(kept, given, count), 2 * _FURTHER_STEPS, _SHORTEST_STEP_TOKENS, count)
        onward = self._onward(2, steps, each, StepStatus.CONTINUED)
        grammar = Sequenced((Free(each, "</step_1>"), Literal(self._after(mark)), onward))
        return Remainder(kept, given, grammar, _opening(1), messages)

    def _onward(self, number: int, steps: int, each: int, mark: StepStatus) -> Grammar:
        """At most ``steps`` further steps, then the answer."""
        inside = self._layout.inside
        closing = f"{inside}</answer>"
        known = None if self.known is None else Literal(self.known + closing)
        answer = known or Free(_LONGEST_ANSWER_TOKENS, closing, one_line=True)
        return Onward(number, steps, each, self._after(mark), Sequenced((Literal(f"<answer>{inside}"), answer)))

    def _room(self, kept: int, given: Sequence[str], count: Callable[[str], int]) -> int:
        """Tokens that are left for free text after the copies and the answer."""
        copied = sum(count(piece.text) for piece in self.pieces[:kept]) + sum(map(count, given))
        answer = _LONGEST_ANSWER_TOKENS if self.known is None else count(self.known)
        room = self._budget - copied - answer - count("<answer></answer>")
        if room < _SHORTEST_STEP_TOKENS:
            raise BudgetTooSmallError(
                f"the copies take {copied} tokens and the answer {answer} of the {self._budget} that a critique may "
                "have; raise critic.max_new_tokens"
            )
        return room

    def _shares(self, room: int, steps: int, least: int, count: Callable[[str], int]) -> tuple[int, int]:
        """``room`` shared out among a first step and up to ``steps`` more: their number and the tokens of each.

        There are as many as have room for a step half as long again as the attempt's longest; else fewer, and one of
        ``least`` tokens at last.
        """
        tags = count(f"<step_10></step_10>{self._after(StepStatus.CONTINUED)}")
        longest = max((count(step.body) for step in self.steps), default=_STEP_TOKENS // 4)
        ample = max(least, _SHORTEST_STEP_TOKENS + longest * 3 // 2)
        for further, enough in (*((n, ample) for n in range(min(steps, _MOST_STEPS), -1, -1)), (0, least)):
            each = room // (further + 1) - tags
            if each >= enough:
                return further, min(max(enough, _STEP_TOKENS), each)
        raise BudgetTooSmallError(
            f"a step of {least} tokens must fit, and after the copies {room} are left with its tags; raise "
            "critic.max_new_tokens"
        )

    def _pieces_before(self, step: int) -> int:
        """How many pieces of the draft are kept where ``step`` is wrong. Of a conversation none is the answer's."""
        return 0 if self.conversation is not None else step * 3

    def finish(self, choosing: Choosing, text: str, cut: Collection[Forced] = ()) -> Finished:
        """The critique in the marked form that validation reads; ``text`` is ``open_text`` and what was written.

        ``cut`` are its parts that a bound has cut.
        """
        place = choosing.place
        written = _completed(text)
        at = len(self.steps) if place is None else place.step
        complete = self._trace.complete_steps
        marked = [(step.number, step.body, StepStatus.COPIED) for step in complete[:at]]
        verdict, first = self._verdict(place, text)
        if verdict is Verdict.UNJUSTIFIED:
            inserted = self._body(written.steps[0], StepStatus.INSERTED)
            marked.append((marked[-1][0] + 1 if marked else 1, inserted, StepStatus.INSERTED))
            marked += [(step.number + 1, step.body, StepStatus.COPIED) for step in complete[at:]]
        else:
            marks = [first, *[StepStatus.CONTINUED] * len(written.steps)]
            number = marked[-1][0] if marked else 0
            marked += [
                (number + i, self._body(step, mark), mark)
                for i, (step, mark) in enumerate(zip(written.steps, marks, strict=False), start=1)
            ]
        # Where the grader does not know whether the attempt's answer is the known one, the known one is given.
        copied = verdict in (Verdict.CORRECT, Verdict.UNJUSTIFIED) and (self.known is None or self._right is True)
        answer = written.answer.body if written.answer is not None else self._unwritten_answer(copied)
        # As the prompt set's own critiques are spaced: there are tokenizers to which a tag is a word.
        layout = self._layout
        lines = [
            f"<step_{n}>{body}</step_{n}>{layout.before_mark}<{mark}/>{layout.separator}" for n, body, mark in marked
        ]
        settled = {choosing.overruled, *cut}
        if self.known is not None and not copied:
            settled.add(Forced.ANSWER)
        return Finished(
            "".join([*lines, f"<answer>{layout.inside}{answer}{layout.inside}</answer>\n<verdict>{verdict}</verdict>"]),
            tuple(forced for forced in Forced if forced in settled),
        )

    def _body(self, step: TaggedStep, mark: StepStatus) -> str:
        """The body of a written step: one that its bound has ended has no closing tag before its mark."""
        if step.closed:
            return step.body
        return without_begun_tag(step.body.rstrip().removesuffix(self._after(mark).rstrip()))

    def _unwritten_answer(self, copied: bool) -> str:
        """The answer where none was written: the attempt's own, or the known one where there is one."""
        given = self._trace.answer.body if self._trace.answer is not None else ""
        return given if copied else self.known or ""

    def _verdict(self, place: Place | None, text: str) -> tuple[Verdict, StepStatus]:
        """The verdict that follows, and the mark of the first step that was written."""
        if place is None:
            verdict = Verdict.INCOMPLETE if self._trace.answer is None else Verdict.CORRECT
            return verdict, StepStatus.CONTINUED
        if place.step == len(self.steps):
            return Verdict.INCORRECT, StepStatus.INSERTED
        chosen = place.kind is None and text.endswith(f"<{StepStatus.INSERTED}/>")
        if place.kind is StepStatus.INSERTED or chosen:
            return Verdict.UNJUSTIFIED, StepStatus.INSERTED
        return Verdict.INCORRECT, StepStatus.CORRECTED


def _completed(text: str) -> Trace:
    """What was written. An answer that its bound has ended has no closing tag."""
    written = parse_trace(text)
    return parse_trace(f"{without_begun_tag(text)}</answer>") if answer_is_open(written, text) else written


def _opening(number: int) -> str:
    return f"<step_{number}>"


def _holds_answer(split: SplitAttempt) -> bool:
    """Whether the last step states the answer: then a copy of it cannot stand before another one."""
    if split.answer is None or not split.steps:
        return False
    start, end = split.steps[-1]
    return start <= split.answer[0] and split.answer[1] <= end
