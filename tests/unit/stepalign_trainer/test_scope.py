"""Token spans, distillation scope and the error position, counted by hand.

A step of the lab is 7 tokens (tag, a, op, b, =, result, tag), an answer 3, EOS 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stepalign.critique.splitting import split_attempt
from stepalign.errors import UnusableRolloutError
from stepalign.types import Critique, CritiqueRequest
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.scope import TokenGroups, token_groups
from stepalign_trainer.batch.spans import token_spans
from support.critic_answers import answer_of

MakeRollout = Callable[..., Rollout]
MakeCritique = Callable[[Rollout], Critique]
ENDS_RIGHT = "<step_4> 7 + 1 = 8 </step_4> <answer> 8 </answer>"


@pytest.fixture(scope="module")
def bytewise() -> Any:
    """A byte-level BPE tokenizer without merges: every byte is a token, so "é" are two and "😀" are four."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=257, initial_alphabet=alphabet, special_tokens=["<eos>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


@pytest.fixture
def groups_of(tokenizer: Any, rollout_of: MakeRollout, critique_of: MakeCritique) -> Callable[..., TokenGroups]:
    def make(attempt: str, finish: str = "stop", scope: Any = "through_first_error") -> TokenGroups:
        rollout = rollout_of(attempt, finish)
        return token_groups(scope, rollout, critique_of(rollout), token_spans(rollout, tokenizer))

    return make


def test_spans_of_words_begin_at_the_space_before_them(tokenizer: Any, rollout_of: MakeRollout) -> None:
    rollout = rollout_of("<step_1> 3 + 4 = 7 </step_1> so")
    assert token_spans(rollout, tokenizer) == [
        (0, 8),
        (8, 10),
        (10, 12),
        (12, 14),
        (14, 16),
        (16, 18),
        (18, 28),
        (28, 31),
        (31, 31),  # EOS
    ]


def test_spans_of_what_was_cut_off_have_no_eos(tokenizer: Any, rollout_of: MakeRollout) -> None:
    assert token_spans(rollout_of("<step_1> 3", "length"), tokenizer) == [(0, 8), (8, 10)]


def test_eos_alone_has_an_empty_span(tokenizer: Any, rollout_of: MakeRollout) -> None:
    assert token_spans(rollout_of(""), tokenizer) == [(0, 0)]


def test_bytes_of_a_character_share_its_span(bytewise: Any, make_rollout: MakeRollout) -> None:
    text = "aé≥😀b"
    ids = [*bytewise(text)["input_ids"], bytewise.eos_token_id]
    rollout = make_rollout(completion_token_ids=ids, text=text, behaviour_logprobs=None)
    two, three, four = [(1, 2)] * 2, [(2, 3)] * 3, [(3, 4)] * 4
    assert token_spans(rollout, bytewise) == [(0, 1), *two, *three, *four, (4, 5), (5, 5)]


def test_a_character_that_was_cut_off_has_a_span_to_the_end(bytewise: Any, make_rollout: MakeRollout) -> None:
    ids = bytewise("a😀")["input_ids"][:3]
    text = bytewise.decode(ids)
    rollout = make_rollout(completion_token_ids=ids, text=text, finish_reason="length", behaviour_logprobs=None)
    assert token_spans(rollout, bytewise) == [(0, 1), (1, len(text)), (1, len(text))]


def test_bytes_that_are_no_character_still_have_spans(bytewise: Any, make_rollout: MakeRollout) -> None:
    smiley = bytewise("😀")["input_ids"]
    ids = [*smiley[:2], *bytewise("ab")["input_ids"]]
    text = bytewise.decode(ids)
    assert text.endswith("ab") and "�" in text
    rollout = make_rollout(completion_token_ids=ids, text=text, finish_reason="length", behaviour_logprobs=None)
    spans = token_spans(rollout, bytewise)
    assert [text[start:end] for start, end in spans] == ["�", "�", "a", "b"]
    assert spans[0] == spans[1]


@pytest.mark.parametrize(
    "text", ["<step_1> 4", "<step_1>  3", "<step_1> 3 ", "<step_1>", "", "x<step_1> 3", "<step_1> 3 + 4"]
)
def test_a_text_that_is_not_the_decoding_is_refused(tokenizer: Any, rollout_of: MakeRollout, text: str) -> None:
    with pytest.raises(UnusableRolloutError, match="rollout r0: its text is not the decoding") as caught:
        token_spans(rollout_of("<step_1> 3", text=text), tokenizer)
    assert caught.value.reason == "text_is_not_its_tokens"


@pytest.mark.parametrize(
    ("attempt", "finish", "in_scope", "first_error"),
    [
        # A: everything, EOS included.
        pytest.param("right", "stop", 32, None, id="A"),
        # D: through the closing tag of the wrong step; its result is its sixth token.
        pytest.param("wrong_step", "stop", 14, 12, id="D"),
        # D: the answer is the error: "<answer> 5 </answer>" are tokens 28, 29 and 30.
        pytest.param("wrong_answer", "stop", 31, 29, id="D answer"),
        # B: the step after the insertion; "9" (token 8) stands where the missing step's "7" should.
        pytest.param("missing_step", "stop", 14, 8, id="B"),
        # B, the last step missing: the answer follows the insertion, "<answer>" stands for "<step_4>".
        pytest.param("missing_last", "stop", 24, 21, id="B last"),
        # D: an early answer; "<answer>" stands for the inserted "<step_2>".
        pytest.param("<step_1> 3 + 4 = 7 </step_1> <answer> 5 </answer>", "stop", 10, 7, id="D early answer"),
        # C: everything.
        pytest.param("unfinished", "length", 10, None, id="C"),
        # C that stopped by itself: EOS is in scope too, it is what was wrong.
        pytest.param("unfinished", "stop", 11, 10, id="C stopped"),
        # D in the unfinished step: "+" instead of "*".
        pytest.param("unfinished_wrong", "length", 10, 9, id="D unfinished"),
    ],
)
def test_scope_and_first_error_of_each_case(
    groups_of: Callable[..., TokenGroups], attempt: str, finish: str, in_scope: int, first_error: int | None
) -> None:
    assert groups_of(attempt, finish) == TokenGroups(in_scope=in_scope, first_error=first_error)


def test_eos_after_a_wrong_unfinished_step_is_out_of_scope(groups_of: Callable[..., TokenGroups]) -> None:
    assert groups_of("unfinished_wrong", "stop") == TokenGroups(in_scope=10, first_error=9)


def test_of_text_after_a_right_answer_the_first_token_is_kept(groups_of: Callable[..., TokenGroups]) -> None:
    steps = "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> "
    # 31 tokens up to the answer's closing tag; token 31 stands where EOS should.
    assert groups_of(f"{steps}{ENDS_RIGHT} so 8").in_scope == 32
    assert groups_of(f"{steps}{ENDS_RIGHT} so 8", "length").in_scope == 32
    assert groups_of(f"{steps}{ENDS_RIGHT} so 8", scope="full").in_scope == 34


def test_text_after_a_wrong_answer_is_out_of_scope(groups_of: Callable[..., TokenGroups]) -> None:
    steps = "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> "
    wrong = "<step_4> 7 + 1 = 8 </step_4> <answer> 5 </answer> so 5"
    assert groups_of(f"{steps}{wrong}") == TokenGroups(in_scope=31, first_error=29)


def test_a_step_too_many_is_the_first_error(groups_of: Callable[..., TokenGroups]) -> None:
    steps = "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> "
    # The critique answers where the fifth step opens (token 28).
    more = "<step_4> 7 + 1 = 8 </step_4> <step_5> 8 + 0 = 8 </step_5> <answer> 8 </answer>"
    assert groups_of(f"{steps}{more}") == TokenGroups(in_scope=35, first_error=28)


def test_an_error_in_the_first_step_keeps_that_step_alone(groups_of: Callable[..., TokenGroups]) -> None:
    attempt = "<step_1> 3 + 4 = 8 </step_1> <step_2> 8 * 7 = 6 </step_2> <answer> 6 </answer>"
    assert groups_of(attempt) == TokenGroups(in_scope=7, first_error=5)


@pytest.mark.parametrize("attempt", ["right", "wrong_step", "wrong_answer", "missing_step"])
def test_full_scope_keeps_every_token_and_the_same_error(
    groups_of: Callable[..., TokenGroups], rollout_of: MakeRollout, attempt: str
) -> None:
    full = groups_of(attempt, scope="full")
    assert full.in_scope == len(rollout_of(attempt).completion_token_ids)
    assert full.first_error == groups_of(attempt).first_error


def test_without_a_critique_every_token_is_in_scope(tokenizer: Any, rollout_of: MakeRollout) -> None:
    rollout = rollout_of("wrong_step")
    groups = token_groups("through_first_error", rollout, None, token_spans(rollout, tokenizer))
    assert groups == TokenGroups(in_scope=32, first_error=None, aligned=False)


def random_scopes(
    tokenizer: Any, rollout: Rollout, critique: Critique, ids: list[str], scope: Any = "random_step"
) -> list[int]:
    spans = token_spans(rollout, tokenizer)
    renamed = [rollout.model_copy(update={"rollout_id": name}) for name in ids]
    return [token_groups(scope, one, critique, spans).in_scope for one in renamed]


IDS = [f"v000000/p{i}/0" for i in range(40)]


@pytest.mark.parametrize(
    ("attempt", "ends"),
    [
        # After one of four steps, or after the answer; never EOS.
        ("wrong_step", {7, 14, 21, 28, 31}),
        ("wrong_answer", {7, 14, 21, 28, 31}),
        ("missing_step", {7, 14, 21, 24}),
    ],
)
def test_a_random_scope_ends_after_any_segment_by_the_rollouts_id_alone(
    tokenizer: Any, rollout_of: MakeRollout, critique_of: MakeCritique, attempt: str, ends: set[int]
) -> None:
    rollout = rollout_of(attempt)
    critique = critique_of(rollout)
    drawn = random_scopes(tokenizer, rollout, critique, IDS)
    assert set(drawn) == ends
    assert random_scopes(tokenizer, rollout, critique, IDS[::-1])[::-1] == drawn
    errors = {
        token_groups("random_step", rollout, critique, token_spans(rollout, tokenizer)).first_error,
        token_groups("full", rollout, critique, token_spans(rollout, tokenizer)).first_error,
    }
    assert len(errors) == 1 and None not in errors  # the error stays where it is


def test_a_random_scope_is_the_same_in_every_process(
    tokenizer: Any, rollout_of: MakeRollout, critique_of: MakeCritique
) -> None:
    """Not by Python's hash, which differs from process to process."""
    rollout = rollout_of("wrong_step")
    assert random_scopes(tokenizer, rollout, critique_of(rollout), IDS[:8]) == [21, 7, 28, 14, 28, 28, 21, 7]


@pytest.mark.parametrize(("attempt", "finish"), [("right", "stop"), ("unfinished", "length"), ("unfinished", "stop")])
def test_without_an_error_the_random_scope_is_the_usual_one(
    tokenizer: Any, rollout_of: MakeRollout, critique_of: MakeCritique, attempt: str, finish: str
) -> None:
    rollout = rollout_of(attempt, finish)
    critique = critique_of(rollout)
    usual = random_scopes(tokenizer, rollout, critique, IDS, "through_first_error")
    assert random_scopes(tokenizer, rollout, critique, IDS) == usual and len(set(usual)) == 1


def test_text_after_the_answer_ends_a_random_scope_too(
    tokenizer: Any, rollout_of: MakeRollout, critique_of: MakeCritique
) -> None:
    steps = "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 9 </step_2> <step_3> 9 - 2 = 7 </step_3> "
    rollout = rollout_of(f"{steps}{ENDS_RIGHT} so 8")
    assert random_scopes(tokenizer, rollout, critique_of(rollout), IDS[:3]) == [32, 32, 32]


# Untagged: a step is a line, and the last one is nothing but the answer.
LINES = "the sum is 3 + 4 = 7\nthen 7 * 7 = 48\nand 48 - 2 = 46\nThe answer is 46"


@pytest.fixture
def untagged(bytewise: Any, make_rollout: MakeRollout) -> Callable[..., Rollout]:
    """Every character is a token."""

    def make(text: str = LINES, **overrides: Any) -> Rollout:
        ids = [*bytewise(text)["input_ids"], bytewise.eos_token_id]
        problem = {"id": "p0", "question": "?", "answer": "47"}
        fields = {"problem": problem, "completion_token_ids": ids, "text": text, "behaviour_logprobs": None}
        return make_rollout(**(fields | overrides))

    return make


def critiqued(rollout: Rollout, critic_text: str) -> Critique:
    """As the critic's service answers."""
    request = CritiqueRequest(question="?", attempt=rollout.text, answer=rollout.problem.answer)
    critique = answer_of(request, critic_text).critique
    assert critique is not None, critic_text
    return critique


CORRECTED = (
    "<step_1>the sum is 3 + 4 = 7</step_1><copied/>{}<corrected/><step_3>and 49 - 2 = 47</step_3><continued/>"
    "<answer>47</answer><verdict>incorrect</verdict>"
)


@pytest.mark.parametrize(
    "corrected",
    ["<step_2>then 7 * 7 = 49</step_2>", "<step_2> then 7 * 7 = 49 </step_2>", "<step_2>\nthen  7 * 7 = 49\n</step_2>"],
)
def test_the_error_of_an_untagged_attempt_is_where_its_text_differs(
    untagged: Callable[..., Rollout], bytewise: Any, corrected: str
) -> None:
    """As in a tagged one: at the "8" of "48", not at the step's first letter, and whitespace aside."""
    rollout = untagged()
    critique = critiqued(rollout, CORRECTED.format(corrected))
    end = LINES.index("\nand")
    groups = token_groups("through_first_error", rollout, critique, token_spans(rollout, bytewise))
    assert groups == TokenGroups(in_scope=end, first_error=LINES.index("8\nand"))
    # The same attempt with tags.
    tagged = untagged(split_attempt(LINES).tagged)
    found = token_groups("full", tagged, critiqued(tagged, CORRECTED.format(corrected)), token_spans(tagged, bytewise))
    assert found.first_error is not None and tagged.text[found.first_error :].startswith("8</step_2>")


def test_a_wrong_answer_of_an_untagged_attempt_is_where_it_differs(
    untagged: Callable[..., Rollout], bytewise: Any
) -> None:
    rollout = untagged(problem={"id": "p0", "question": "?", "answer": "41"})
    copies = "".join(f"<step_{i}>{line}</step_{i}><copied/>" for i, line in enumerate(LINES.split("\n")[:3], start=1))
    critique = critiqued(rollout, f"{copies}<answer>41</answer><verdict>incorrect</verdict>")
    groups = token_groups("through_first_error", rollout, critique, token_spans(rollout, bytewise))
    assert groups == TokenGroups(in_scope=len(LINES), first_error=len(LINES) - 1)


def test_a_step_too_many_of_an_untagged_attempt_errs_at_its_first_letter(
    untagged: Callable[..., Rollout], bytewise: Any
) -> None:
    """The critique answers there: the tags differ, which the text does not have."""
    rollout = untagged("it is 40 + 7\nso\nThe answer is 46")
    critique = critiqued(
        rollout, "<step_1>it is 40 + 7</step_1><copied/><answer>47</answer><verdict>incorrect</verdict>"
    )
    groups = token_groups("through_first_error", rollout, critique, token_spans(rollout, bytewise))
    assert groups == TokenGroups(in_scope=15, first_error=13)


def test_a_random_scope_of_an_untagged_attempt_ends_after_any_of_its_steps(
    untagged: Callable[..., Rollout], bytewise: Any
) -> None:
    rollout = untagged()
    critique = critiqued(rollout, CORRECTED.format("<step_2>then 7 * 7 = 49</step_2>"))
    drawn = random_scopes(bytewise, rollout, critique, IDS)
    assert set(drawn) == {end for _, end in split_attempt(LINES).steps} | {len(LINES)}
    assert random_scopes(bytewise, rollout, critique, IDS[::-1])[::-1] == drawn


@pytest.mark.parametrize("scope", ["full", "through_first_error", "random_step"])
@pytest.mark.parametrize("difference", [None, (0, 0), (3, 2), (-4, 8), (0, 10), (60, 90), (10**9, 10**9 + 1)])
@pytest.mark.parametrize("attempt", ["wrong_step", "3 + 4 = 8 so 8"])
def test_a_critique_that_points_at_no_step_is_of_another_text(
    tokenizer: Any, rollout_of: MakeRollout, critique_of: MakeCritique, attempt: str, difference: Any, scope: Any
) -> None:
    found = critique_of(rollout_of("wrong_step"))
    alignment = found.alignment.model_copy(update={"first_difference": difference})
    critique = found.model_copy(update={"alignment": alignment, "first_error_step": 99})
    rollout = rollout_of(attempt)
    with pytest.raises(UnusableRolloutError, match="rollout r0: the critique's first difference") as caught:
        token_groups(scope, rollout, critique, token_spans(rollout, tokenizer))
    assert caught.value.reason == "critique_is_of_another_text"
