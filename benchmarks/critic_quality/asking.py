"""What to ask a critic: how often its likeliest step is the first wrong one (``results/critic_asking.jsonl``).

    python -m benchmarks.critic_quality.asking MODEL --data processbench_gsm8k_dev.jsonl [--form turns …]

Each form but the last is one forward pass over the conversation that calls every step right; a step's score is the
log-odds of the word "wrong" against "right" there. Of the data those solutions are taken whose answer is wrong and
whose question is in the half that prompts are chosen on. A row is written as it is finished, and a row that is there is
passed over. Without MODEL only the table of ``docs/critique.md`` is written from the rows.

============ ====================================================================================================
``after``    the solution written again, a mark after each step
``before``   the same, the mark before it
``list``     a line with a word for each step
``turns``    the steps one by one, as turns of the user; a word for each
``opened``   as ``turns``, after a step 0 that is right
``told``     as ``opened``, and the problem is followed by the fact that the answer is wrong: ``chat-v2``
``checked``  each step by itself, after those before it: the model writes a short check, and then the word
============ ====================================================================================================
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.arms_benchmark import ROOT, run_as_program
from benchmarks.comparison_section import markdown_table, replace_section
from benchmarks.critic_quality.rules import NO_STEP, given_the_answer, uniform
from stepalign.prompts import Message, render_parts
from stepalign_run.data import LabelledSolution, in_half, load_labelled

RESULTS = ROOT / "benchmarks" / "results" / "critic_asking.jsonl"
PAGE = ROOT / "docs" / "critique.md"
RIGHT, WRONG = "right", "wrong"
_SCRIBE = "You check a student's solution step by step against the reference solution."
_TEACHER = (
    "You are a teacher who checks a student's solution step by step against the reference solution. The student shows "
    'one step after the other. Answer "right" if the step is right, and "wrong" if there is a mistake in it.'
)

Parts = list[tuple[str, bool]]
"""Text of an answer, and whether it is a word that is decided."""


def _asked(solution: LabelledSolution, instruction: str) -> list[Message]:
    tagged = "\n".join(f"<step_{i}>{step}</step_{i}>" for i, step in enumerate(solution.steps, start=1))
    content = (
        f"Problem:\n{solution.question}\n\nReference solution:\n{solution.reference_solution}\n\n"
        f"Student's solution:\n{tagged}\n\n{instruction}"
    )
    return [{"role": "system", "content": _SCRIBE}, {"role": "user", "content": content}]


def _copies(solution: LabelledSolution, *, before: bool) -> Parts:
    parts: Parts = []
    for i, step in enumerate(solution.steps, start=1):
        copy = f"<step_{i}>{step}</step_{i}>"
        parts += [("<", False), (RIGHT, True), (f"/>{copy}\n", False)] if before else []
        parts += [] if before else [(f"{copy}<", False), (RIGHT, True), ("/>\n", False)]
    return parts


def _lines(solution: LabelledSolution) -> Parts:
    return [
        part
        for i in range(1, len(solution.steps) + 1)
        for part in ((f"Step {i}:", False), (f" {RIGHT}", True), ("\n", False))
    ]


def _turns(solution: LabelledSolution, *, opened: bool, told: bool) -> list[Message]:
    first = f"Problem:\n{solution.question}\n\nReference solution:\n{solution.reference_solution}\n\n"
    if told:
        first += (
            f"The student's final answer is not {solution.answer}, so there is a mistake in one of the student's "
            "steps.\n\n"
        )
    steps = [f"Step {i}: {step}" for i, step in enumerate(solution.steps, start=1)]
    shown = ["Step 0: I read the problem.", *steps] if opened else steps
    messages: list[Message] = [{"role": "system", "content": _TEACHER}]
    for i, step in enumerate(shown):
        messages += [
            {"role": "user", "content": first + step if i == 0 else step},
            {"role": "assistant", "content": RIGHT},
        ]
    return messages


_INSTRUCTIONS: dict[str, tuple[str, Callable[[LabelledSolution], Parts]]] = {
    "after": (
        "Write the student's solution again, step by step. After each step write <right/> or <wrong/>.",
        lambda solution: _copies(solution, before=False),
    ),
    "before": (
        "Write the student's solution again, step by step. Before each step write <right/> or <wrong/>.",
        lambda solution: _copies(solution, before=True),
    ),
    "list": ("For each step of the student's solution say whether it is right or wrong.", _lines),
}
CHECKED = "checked"
FORMS = (*_INSTRUCTIONS, "turns", "opened", "told", CHECKED)
_CHECK_TOKENS = 48
_VERDICT = "\nThe step is"


def draft(tokenizer: Any, form: str, solution: LabelledSolution) -> tuple[list[int], list[int], tuple[int, int]]:
    """Token ids, the places before each decided word, and the first tokens of "right" and "wrong"."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, places = list[int](), list[int]()
    if form in _INSTRUCTIONS:
        instruction, parts = _INSTRUCTIONS[form]
        messages = _asked(solution, instruction)
        ids = [token for _, tokens in render_parts(tokenizer, messages, add_generation_prompt=True) for token in tokens]
        for text, decided in parts(solution):
            places += [len(ids) - 1] if decided else []
            ids += encode(text)
        space = " " if form == "list" else ""
        return ids, places, (encode(space + RIGHT)[0], encode(space + WRONG)[0])
    messages = _turns(solution, opened=form != "turns", told=form == "told")
    said = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    for index, tokens in render_parts(tokenizer, messages, add_generation_prompt=False):
        places += [len(ids) - 1] if index in said else []
        ids += tokens
    return ids, places[-len(solution.steps) :], (encode(RIGHT)[0], encode(WRONG)[0])


def _checks(solution: LabelledSolution) -> list[list[Message]]:
    """For each step the request to check it in a sentence."""
    steps = [f"Step {i}: {step}" for i, step in enumerate(solution.steps, start=1)]
    return [
        [
            {"role": "system", "content": _SCRIBE},
            {
                "role": "user",
                "content": (
                    f"Problem:\n{solution.question}\n\nReference solution:\n{solution.reference_solution}\n\n"
                    "The student's solution so far:\n" + "\n".join(steps[:i]) + "\n\n"
                    f"Check step {i} in one short sentence. Then say whether step {i} is right or wrong."
                ),
            },
        ]
        for i in range(1, len(steps) + 1)
    ]


def _checked_log_odds(model: Any, tokenizer: Any, solution: LabelledSolution) -> list[float]:
    """As :func:`log_odds`, after a check that the model writes, greedily, up to a line's end."""
    prompts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in _checks(solution)
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    right, wrong = (tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in (RIGHT, WRONG))
    with torch.inference_mode():
        made = model.generate(
            **inputs,
            max_new_tokens=_CHECK_TOKENS,
            generation_config=GenerationConfig(do_sample=False, pad_token_id=tokenizer.eos_token_id),
            stop_strings=["\n"],
            tokenizer=tokenizer,
        )
        checks = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found: list[float] = []
        for prompt, check in zip(prompts, checks, strict=True):
            text = prompt + check.partition("\n")[0] + _VERDICT
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
            found.append(round(float(logits[wrong] - logits[right]), 4))
    return found


def log_odds(model: Any, tokenizer: Any, form: str, solution: LabelledSolution) -> list[float]:
    """Of each step: log P(wrong) less log P(right), in nats, given that the steps before it were called right."""
    if form == CHECKED:
        return _checked_log_odds(model, tokenizer, solution)
    ids, places, (right, wrong) = draft(tokenizer, form, solution)
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, places]
        logits = model.get_output_embeddings()(hidden).float()
    return [round(value, 4) for value in (logits[:, wrong] - logits[:, right]).tolist()]


def rows() -> Iterator[dict[str, Any]]:
    """The rows that are there."""
    if RESULTS.is_file():
        yield from map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())


def table() -> str:
    """Share of solutions whose largest log-odds stand at the labelled step, by model and form."""
    found: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in rows():
        odds = row["log_odds"]
        found[row["model"], row["form"]].append(odds.index(max(odds)) == row["first_error"])
    lines = [
        [model, form, str(len(hits)), f"{100 * sum(hits) / len(hits):.0f} %"]
        for (model, form), hits in sorted(found.items(), key=lambda each: (each[0][0], FORMS.index(each[0][1])))
    ]
    return markdown_table(["critic", "form", "solutions", "found"], lines)


def main(
    model: Annotated[Path | None, typer.Argument(help="Folder of a model with a chat template.")] = None,
    data: Annotated[Path | None, typer.Option(help="ProcessBench's GSM8K part with references and answers.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the rows; else its folder's.")] = None,
    form: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(FORMS)}; repeatable; else all.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many solutions.")] = None,
) -> None:
    """Measure forms on a model; without one, write the table alone."""
    if model is not None:
        if data is None or not data.is_file():
            raise typer.BadParameter(
                "--data must name a file of labelled solutions, such as processbench_gsm8k_dev.jsonl"
            )
        _measure(model, name or model.name, data, form or list(FORMS), limit)
    replace_section(PAGE, "critic-asking", table())


def _is_wrong(solution: LabelledSolution) -> bool:
    """Whether there is a wrong step, and the answer is wrong too."""
    return solution.first_error is not None and given_the_answer(solution, uniform) != {NO_STEP: 1.0}


def _measure(path: Path, name: str, data: Path, forms: list[str], limit: int | None) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    known = {(row["model"], row["form"], row["id"]) for row in rows()}
    wrong = [each for each in load_labelled(str(data)).solutions if in_half(each, "dev") and _is_wrong(each)]
    chosen = wrong[:limit]
    with RESULTS.open("a", encoding="utf-8") as file:
        for each in forms:
            for solution in chosen:
                if (name, each, solution.id) in known:
                    continue
                row = {"model": name, "form": each, "id": solution.id, "first_error": solution.first_error}
                file.write(json.dumps(row | {"log_odds": log_odds(model, tokenizer, each, solution)}) + "\n")
                file.flush()


if __name__ == "__main__":
    run_as_program(main)
