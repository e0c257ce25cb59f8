"""The messages of a critique in turns: one step after the other is shown, and each is answered with one word."""

from __future__ import annotations

from dataclasses import dataclass

from stepalign.errors import PromptError
from stepalign.prompts import Message, Prompt, has_prompt, load_prompt
from stepalign.prompts.layout import CritiqueLayout


@dataclass(frozen=True)
class TurnPrompts:
    """The prompts of the form ``turns``: ``first`` has the problem and a first turn, which ``turn`` fills.

    ``known``, if the set has it, fills ``known`` of the first where the attempt's answer is known to be wrong.
    """

    first: Prompt
    step: Prompt
    write: Prompt
    go_on: Prompt
    known: Prompt | None

    @property
    def all(self) -> list[Prompt | None]:
        """Each of them."""
        return [self.first, self.step, self.write, self.go_on, self.known]

    @classmethod
    def load(cls, version: str) -> TurnPrompts:
        """The prompts of a set. Raises PromptError when one is missing, or has no place in the first one."""
        names = ("critique", "critique_step", "critique_write", "critique_continue")
        prompts = cls(
            *(load_prompt(version, name) for name in names),
            known=load_prompt(version, "critique_known") if has_prompt(version, "critique_known") else None,
        )
        if prompts.known is not None and "known" not in prompts.first.fields:
            raise PromptError(
                f"prompt {version}/critique_known has no place: {version}/critique must hold {{{{known}}}}"
            )
        return prompts


class Conversation:
    """The conversation about one attempt, whose ``steps`` are texts. ``values`` fill the first prompt but its turn.

    ``right_answer`` is told where the attempt arrives at another one: then one of its steps is wrong.
    """

    def __init__(
        self,
        prompts: TurnPrompts,
        layout: CritiqueLayout,
        values: dict[str, str],
        steps: list[str],
        right_answer: str | None = None,
    ) -> None:
        self._prompts = prompts
        self._right, self._wrong = layout.right, layout.wrong
        self._values = {name: value for name, value in values.items() if name in prompts.first.fields}
        self._steps = steps
        if prompts.known is not None and right_answer is not None:
            self._values["known"] = prompts.known.fill(answer=right_answer)[-1]["content"] + "\n\n"
        self._asked: list[Message] = []
        """The messages of the first steps, of as many as were asked for."""
        self._ends: list[int] = []
        """For each of these steps, how many messages ask about it."""

    def asking(self, step: int) -> list[Message]:
        """Up to the question about ``step`` (from 0), all steps before it being right."""
        if not self._steps:
            return self._beginning("")
        for following in range(len(self._ends), step + 1):
            (turn,) = self._prompts.step.fill(number=str(following + 1), step=self._steps[following])[-1:]
            if following:
                self._asked += [_said(self._right), {"role": "user", "content": turn["content"]}]
            else:
                self._asked = self._beginning(turn["content"])
            self._ends.append(len(self._asked))
        return self._asked[: self._ends[step]]

    def approving(self) -> list[Message]:
        """All steps shown and called right."""
        return [*self.asking(len(self._steps) - 1), _said(self._right)] if self._steps else self._beginning("")

    def correcting(self, step: int) -> list[Message]:
        """``step`` is called wrong, and its correction asked for."""
        turn = self._prompts.write.fill(number=str(step + 1))
        return [*self.asking(step), _said(self._wrong), *turn]

    def continuing(self, number: int) -> list[Message]:
        """All steps are called right, and what is missing asked for, from the step of this number on."""
        turn = self._prompts.go_on.fill(number=str(number))
        return [*self.approving(), *turn] if self._steps else self._beginning(turn[-1]["content"])

    def _beginning(self, turn: str) -> list[Message]:
        return self._prompts.first.fill(**{**self._values, "turn": turn})


def _said(word: str) -> Message:
    return {"role": "assistant", "content": word}
