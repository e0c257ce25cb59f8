"""The peer: a critic prompt as ProcessBench asks for it, written anew from its paper's description (arXiv 2412.06559).

The model sees the problem and the solution in numbered paragraphs, writes a critique in its own words, and gives the
number of the first wrong paragraph, or −1, in a box. It gets what our critic gets: the reference solution, the known
answer, and the rule of answers: a solution whose answer is right is called right, without a question; one whose
answer is wrong has an error. The paper's prompt knows neither.

Variants, of which the best one on the dev half is the peer; so is, besides, the better one of the first two:

====================== ==============================================================================================
``written``            the number that it writes; where that is −1 or none, any paragraph, all alike
``told``               the same, and the prompt says that the answer is wrong
``written_likeliest``  after the critique of ``written``, the likeliest number of a paragraph in a box
``told_likeliest``     after that of ``told``
``at_once_likeliest``  as ``told_likeliest``, without a critique
====================== ==============================================================================================

The last three choose by the probabilities of all places, as aligned decoding does, and not by what the model writes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.critic_quality.critics import MODELS, model_folder
from benchmarks.critic_quality.rows import BenchRows
from benchmarks.critic_quality.rules import NO_STEP, Distribution, given_the_answer, uniform
from stepalign.prompts import Message
from stepalign_models.caches import cache_parameter
from stepalign_run.data import LabelledData, LabelledSolution

Variant = Literal["written", "told", "written_likeliest", "told_likeliest", "at_once_likeliest"]
AS_WRITTEN: tuple[Variant, ...] = ("written", "told")
LIKELIEST: tuple[Variant, ...] = ("written_likeliest", "told_likeliest", "at_once_likeliest")
Prompting = Literal["asked", "told", "at_once"]
PROMPTINGS: tuple[Prompting, ...] = ("asked", "told", "at_once")
_PROMPTING_OF: dict[Variant, Prompting] = {
    "written": "asked",
    "told": "told",
    "written_likeliest": "asked",
    "told_likeliest": "told",
    "at_once_likeliest": "at_once",
}
MOST_TOKENS = 384
_BATCH = 8
_BOX = re.compile(r"\\boxed\{\s*(-?\d+)\s*\}")
_BEGINNING = "I go through the paragraphs one by one.\n\nParagraph 0:"
_DECISION = "\n\nThe index of the first paragraph with an error is \\boxed{"


def messages(solution: LabelledSolution, *, told: bool) -> list[Message]:
    """The question about one solution."""
    paragraphs = "\n\n".join(f"<paragraph_{i}>\n{step}\n</paragraph_{i}>" for i, step in enumerate(solution.steps))
    known, otherwise = "", " If there is no error anywhere, state -1."
    if told:
        known = (
            f"The correct final answer is {solution.answer}. The solution arrives at a different one, so at least one "
            "of its paragraphs contains an error.\n\n"
        )
        otherwise = ""
    return [
        {
            "role": "user",
            "content": (
                "Below are a math problem, a reference solution to it, and another solution, which is divided into "
                "paragraphs. Each paragraph stands between tags that carry its index, beginning with 0.\n\n"
                f"[Problem]\n{solution.question}\n\n"
                f"[Reference solution]\n{solution.reference_solution}\n\n"
                f"[Solution]\n{paragraphs}\n\n"
                f"{known}"
                "Review the solution paragraph by paragraph and give a critique of each. As soon as you find an error, "
                f"state the index of the paragraph in which it occurs first.{otherwise} Write the index at the end in "
                "\\boxed{}."
            ),
        }
    ]


def is_asked(solution: LabelledSolution) -> bool:
    """Whether the peer is asked about a solution: those whose answer is right are called right."""
    return given_the_answer(solution, uniform) != {NO_STEP: 1.0}


class CriticPrompt:
    """The peer with one model, greedy, on the CPU."""

    def __init__(self, model: str) -> None:
        folder = model_folder(model)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, MODELS[model].dtype)
        ).eval()

    def rows(self, solutions: Sequence[LabelledSolution], prompting: Prompting) -> Iterator[dict[str, Any]]:
        """For each solution the critique, the number in its box, and the log-probability of each paragraph's number."""
        # Of like length together, so that little is padded.
        ordered = sorted(solutions, key=lambda each: len(self._prompt(each, prompting)))
        for start in range(0, len(ordered), _BATCH):
            group = ordered[start : start + _BATCH]
            critiques = [""] * len(group) if prompting == "at_once" else self._critiques(group, prompting)
            for solution, critique in zip(group, critiques, strict=True):
                yield {
                    "id": solution.id,
                    "log_probabilities": self._decide(solution, prompting, critique),
                    "critique": critique,
                }

    def _prompt(self, solution: LabelledSolution, prompting: Prompting) -> str:
        return self._tokenizer.apply_chat_template(
            messages(solution, told=prompting != "asked"), tokenize=False, add_generation_prompt=True
        )

    def _begun(self, solution: LabelledSolution, prompting: Prompting) -> str:
        """The prompt and the beginning of a critique: left to itself the 1.5B model writes -1 and nothing else."""
        return self._prompt(solution, prompting) + _BEGINNING

    def _critiques(self, group: Sequence[LabelledSolution], prompting: Prompting) -> list[str]:
        inputs = self._tokenizer([self._begun(each, prompting) for each in group], return_tensors="pt", padding=True)
        with torch.inference_mode():
            made = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=MOST_TOKENS,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
            )
        texts = self._tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_BEGINNING + text for text in texts]

    def _decide(self, solution: LabelledSolution, prompting: Prompting, critique: str) -> list[float]:
        """Log P of each paragraph's number in a box after the critique, natural logarithm."""
        # A box that is there already is opened again: what follows it is cut off.
        box = max((match.start() for match in _BOX.finditer(critique)), default=None)
        before = f"{critique}{_DECISION}".lstrip() if box is None else critique[:box] + "\\boxed{"
        ids = self._encode(self._prompt(solution, prompting) + before)
        numbers = [self._encode(f"{index}}}") for index in range(len(solution.steps))]
        cache = DynamicCache(config=self._model.config)
        named: dict[str, Any] = {cache_parameter(self._model): cache}
        found: list[float] = []
        with torch.inference_mode():
            self._model(input_ids=torch.tensor([ids[:-1]]), logits_to_keep=1, **named)
            for number in numbers:
                logits = self._model(input_ids=torch.tensor([[ids[-1], *number[:-1]]]), **named).logits[0].float()
                found.append(float(logits.log_softmax(-1)[range(len(number)), number].sum()))
                cache.crop(-len(number))
        return [round(value, 4) for value in found]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def made_of(model: str, data: LabelledData, prompting: Prompting) -> dict[str, Any]:
    """What the rows of a way of asking are made of."""
    asked = messages(data.solutions[0], told=prompting != "asked")
    prompt = json.dumps([asked, _BEGINNING, _DECISION, MOST_TOKENS])
    return {
        "model": model,
        "prompting": prompting,
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "data_sha256": data.sha256,
        "dtype": MODELS[model].dtype,
    }


def measure_peer(
    model: str, data: LabelledData, solutions: Sequence[LabelledSolution], prompting: Prompting, path: Path
) -> None:
    """Ask the peer about those of ``solutions`` that have no row."""
    with BenchRows(path, made_of(model, data, prompting)) as kept:
        missing = [each for each in solutions if each.id not in kept.rows]
        if missing:
            for row in CriticPrompt(model).rows(missing, prompting):
                kept.append(row)


def predicted(solution: LabelledSolution, row: dict[str, Any] | None, variant: Variant) -> Distribution:
    """Where a variant places the error; none without a row, which solutions with a right answer have not."""
    if row is None:
        return {NO_STEP: 1.0}
    if variant in LIKELIEST:
        scores: list[float] = row["log_probabilities"]
        return {scores.index(max(scores)): 1.0}
    boxes = _BOX.findall(row["critique"])
    number = int(boxes[-1]) if boxes else NO_STEP
    return {number: 1.0} if 0 <= number < len(solution.steps) else uniform(solution)


def prompting_of(variant: Variant) -> Prompting:
    """The rows that a variant reads."""
    return _PROMPTING_OF[variant]
