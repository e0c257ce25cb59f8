"""A plan's draft as token ids, and the ids of what follows once its place is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stepalign.errors import PromptError, PromptTooLongError
from stepalign.prompts import Message, render_parts, render_token_ids
from stepalign.prompts.content_tokens import content_token_ids
from stepalign_critic.decoding.plan import Plan, Remainder, Score
from stepalign_critic.errors import BudgetTooSmallError
from stepalign_run.config import CriticServerSection


@dataclass(frozen=True)
class Asked:
    """Log-probabilities that are asked for: those of ``ids``, after the token at ``place`` of the draft."""

    place: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Draft:
    """The prompt and the answer that calls every step right. ``asked`` has, for each deciding piece, what it needs."""

    ids: list[int]
    prompt: int
    """How many of the ids are the prompt's; the answer's, or the conversation's, begin after them."""
    asked: tuple[tuple[Asked, ...], ...]
    in_turns: bool = False

    @property
    def read(self) -> int:
        """How many tokens are read: the prompt's; of a conversation all but its words."""
        return len(self.ids) - len(self.asked) if self.in_turns else self.prompt

    def after(self, thought: list[int]) -> Draft:
        """The same draft with ``thought`` behind the prompt."""
        if not thought:
            return self
        ids = self.ids[: self.prompt] + thought + self.ids[self.prompt :]
        moved = tuple(tuple(Asked(a.place + len(thought), a.ids) for a in piece) for piece in self.asked)
        return Draft(ids, self.prompt + len(thought), moved, self.in_turns)

    def scores(self, logprobs: Callable[[Asked], list[float]]) -> list[Score]:
        """The scores of the deciding pieces. ``logprobs`` gives what is asked for."""
        scores: list[Score] = []
        for piece in self.asked:
            values = [logprobs(asked) for asked in piece]
            if len(piece) == 1 and len(piece[0].ids) > 1:
                own, *others = values[0]
                scores.append(Score(own, tuple(others)))
            else:
                scores.append(Score(sum(value for (value,) in values)))
        return scores


class DraftTokens:
    """Makes drafts with a tokenizer and the options of its chat template."""

    def __init__(self, tokenizer: Any, options: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._options = options

    def encode(self, text: str) -> list[int]:
        """Token ids of a part of an answer."""
        return content_token_ids(self._tokenizer, text) if text else []

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's part."""
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def draft(self, plan: Plan, prompt: list[int]) -> Draft:
        """The draft after ``prompt``, which a conversation replaces by its own beginning.

        Raises PromptError when the words for a step begin alike.
        """
        if plan.conversation is not None:
            return self._conversation(plan, plan.conversation.approving())
        ids, asked = list(prompt), list[tuple[Asked, ...]]()
        for piece in plan.pieces:
            tokens = self.encode(piece.text)
            if piece.step is not None and piece.others:
                asked.append((self._word(len(ids), piece.text, piece.others),))
            elif piece.step is not None:
                asked.append(tuple(Asked(len(ids) - 1 + i, (token,)) for i, token in enumerate(tokens)))
            ids += tokens
        return Draft(ids, len(prompt), tuple(asked))

    def _conversation(self, plan: Plan, messages: list[Message]) -> Draft:
        parts = render_parts(self._tokenizer, messages, add_generation_prompt=not plan.pieces, **self._options)
        latest = max((i for i, (index, _) in enumerate(parts) if index is not None), default=0)
        deciding = [i for i, message in enumerate(messages) if message["role"] == "assistant"][-len(plan.pieces) :]
        ids, asked, first = list[int](), list[tuple[Asked, ...]](), 0
        for index, tokens in parts[: latest + 1] if plan.pieces else parts:
            if plan.pieces and index in deciding:
                piece = plan.pieces[deciding.index(index)]
                first = first or len(ids)
                asked.append((self._word(len(ids), piece.text, piece.others),))
            ids += tokens
        return Draft(ids, first if asked else len(ids), tuple(asked), in_turns=True)

    def _word(self, before: int, own: str, others: Sequence[str]) -> Asked:
        """Where the words part, after ``before`` tokens. Some tokenizers begin all of them with the same token.

        Raises PromptError when some never part, or not all at the same place.
        """
        words = [self.encode(word) for word in (own, *others)]
        for place, tokens in enumerate(zip(*words, strict=False)):
            if len(set(tokens)) == len(words):
                return Asked(before - 1 + place, tokens)
            if len(set(tokens)) > 1:
                break
        raise PromptError(f"the words {[own, *others]} begin alike to this tokenizer; a prompt set needs others")

    def answer(self, plan: Plan, draft: Draft, remainder: Remainder) -> list[int]:
        """The tokens of an answer before what ``remainder`` leaves to be written: of a conversation its words."""
        given = [token for text in remainder.given for token in self.encode(text)]
        if plan.conversation is not None:
            return [asked[0].ids[0] for asked in draft.asked] + given
        return [token for piece in plan.pieces[: remainder.kept] for token in self.encode(piece.text)] + given

    def following(self, plan: Plan, draft: Draft, remainder: Remainder) -> list[int]:
        """The ids after which ``remainder.grammar`` begins, from the prompt on."""
        given = [token for text in remainder.given for token in self.encode(text)]
        if remainder.messages is not None:
            return render_token_ids(self._tokenizer, remainder.messages, **self._options) + given
        kept = [token for piece in plan.pieces[: remainder.kept] for token in self.encode(piece.text)]
        return draft.ids[: draft.prompt] + kept + given


def fitting_draft(drafts: DraftTokens, plan: Plan, prompt: list[int], section: CriticServerSection) -> Draft:
    """The draft after ``prompt``, if it fits the budgets of ``section``.

    Raises PromptTooLongError, and BudgetTooSmallError where the copies alone are over the budget.
    """
    draft = drafts.draft(plan, prompt)
    if draft.read > section.max_prompt_tokens:
        name = "the conversation about the attempt" if draft.in_turns else "the critique prompt"
        raise PromptTooLongError(name, draft.read, section.max_prompt_tokens, "critic.max_prompt_tokens")
    copies = 0 if draft.in_turns else len(draft.ids) - draft.prompt
    if copies > section.max_new_tokens:
        raise BudgetTooSmallError(
            f"a copy of the attempt takes {copies} tokens of the {section.max_new_tokens} that a critique may have; "
            "raise critic.max_new_tokens"
        )
    return draft
