"""Files of labelled solutions, each form as its data set publishes it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from stepalign.errors import ConfigError, ProblemFileError
from stepalign_run.data import LabelledData, in_half, load_labelled
from stepalign_run.data.hub import hub_rows

OWN = {"question": "1 + 1 + 1?", "steps": ["1 + 1 = 2", "2 + 1 = 4"], "first_error": 1}
PROCESSBENCH = {
    "id": "gsm8k-0",
    "generator": "Qwen2-7B-Instruct",
    "problem": "1 + 1 + 1?",
    "steps": ["1 + 1 = 2", "2 + 1 = 4"],
    "final_answer_correct": False,
    "label": 1,
}
MR_BEN = {
    "Question_UUID": "u1",
    "Subject": "college_math",
    "Question": "1 + 1 + 1?",
    "Options": "A: 3 \nB: 4",
    "Ground_Truth_Analysis": "",
    "Ground_Truth_Answer": "B",
    "Ground_Truth_Answer_Modified": "A",
    "Sampled_Model": "Claude2",
    "Model_Solution_Steps": ["Step 1: 1 + 1 = 2", "Step 2: 2 + 1 = 4", "Solution: Choice_B"],
    "Model_Solution_Correctness": "incorrect",
    "Model_Solution_First_Error_Step": "2",
}
MR_GSM8K = {
    "uuid": "u1",
    "question": "1 + 1 + 1?",
    "ground_truth_solution": "1 + 1 + 1 = <<1+1+1=3>>3\n#### 3",
    "ground_truth_answer": 3,
    "model_output_steps": ["Step 1: 1 + 1 = 2", "Step 2: #### 4"],
    "model_output_answer_correctness": "wrong",
    "model_output_solution_correctness": "wrong",
    "model_output_solution_first_error_step": 2,
    "question_type": "original",
}
BIG_BENCH = {
    "input": "Sort: b a",
    "steps": ["b before a", "The answer is b a"],
    "target": "a b",
    "answer": "b a",
    "mistake_index": 0,
}


def prm800k(ratings: list[list[int | None]], finish_reason: str = "found_error", steps: int = 2) -> dict[str, Any]:
    """The first rating of a step is that of the attempt's own, the others are of alternatives."""
    texts = [f"step {number}" for number in range(steps)]
    labels = [
        {
            "completions": [
                {"text": texts[place] if at == 0 else f"other {at}", "rating": rating, "flagged": None}
                for at, rating in enumerate(given)
            ],
            "human_completion": None,
            "chosen_completion": 0,
        }
        for place, given in enumerate(ratings)
    ]
    question = {
        "problem": "1 + 1 + 1?",
        "ground_truth_solution": "three",
        "ground_truth_answer": "3",
        "pre_generated_steps": texts,
    }
    return {"labeler": "x", "question": question, "label": {"steps": labels, "finish_reason": finish_reason}}


def load(folder: Path, *rows: Any, name: str = "data.jsonl") -> LabelledData:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_labelled(str(path))


def refusal(folder: Path, *rows: Any) -> str:
    with pytest.raises(ProblemFileError) as refused:
        load(folder, *rows)
    return str(refused.value)


def test_our_own_form(tmp_path: Path) -> None:
    full = {**OWN, "first_error": None, "reference_solution": "three", "answer": 3, "generator": "m", "id": "a"}
    data = load(tmp_path, OWN, full)
    first, second = data.solutions
    assert data.formats == ("stepalign",) and first.id.startswith("s-")
    assert (first.steps, first.first_error) == (("1 + 1 = 2", "2 + 1 = 4"), 1)
    assert (second.first_error, second.answer, second.reference_solution) == (None, "3", "three")
    assert (second.id, second.generator) == ("a", "m")


@pytest.mark.parametrize(("label", "place"), [(-1, None), (0, 0), (1, 1)])
def test_processbench(tmp_path: Path, label: int, place: int | None) -> None:
    (found,) = load(tmp_path, {**PROCESSBENCH, "label": label}).solutions
    assert (found.id, found.question, found.generator) == ("gsm8k-0", "1 + 1 + 1?", "Qwen2-7B-Instruct")
    assert (found.first_error, found.answer, found.reference_solution) == (place, None, None)


def test_processbench_with_a_reference_and_an_answer_as_some_files_have_them(tmp_path: Path) -> None:
    row = {**PROCESSBENCH, "question": PROCESSBENCH["problem"], "reference_solution": "three", "answer": "3"}
    del row["problem"]
    (found,) = load(tmp_path, row).solutions
    assert (found.question, found.reference_solution, found.answer) == ("1 + 1 + 1?", "three", "3")


def test_a_json_array_a_packed_file_and_a_folder_are_read_as_problem_files_are(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([PROCESSBENCH], indent=1))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(BIG_BENCH).encode()))
    data = load_labelled(str(tmp_path))
    assert data.formats == ("processbench", "big_bench_mistake") and len(data.solutions) == 2


def test_prm800k_the_attempts_own_step_is_rated_and_not_its_alternatives(tmp_path: Path) -> None:
    data = load(
        tmp_path,
        prm800k([[0], [-1, 1, 0]]),
        prm800k([[1, -1], [1]], "solution"),
        prm800k([[-1, 1]]),
    )
    assert [one.first_error for one in data.solutions] == [1, None, 0]
    assert data.solutions[0].steps == ("step 0", "step 1")
    assert (data.solutions[0].answer, data.solutions[0].reference_solution) == ("3", "three")


def test_prm800k_what_has_no_usable_label_is_left_out_and_counted(tmp_path: Path) -> None:
    data = load(
        tmp_path,
        prm800k([[1], [-1]]),
        prm800k([[1]], "give_up"),
        prm800k([], "bad_problem"),
        prm800k([[1]], "solution"),
        prm800k([[None], [-1]]),
    )
    assert [one.first_error for one in data.solutions] == [1]
    assert data.left_out == {
        "a step before the first wrong one has no rating": 1,
        "labelling ended with bad_problem": 1,
        "labelling ended with give_up": 1,
        "no wrong step, and not rated to the end": 1,
    }


def test_prm800k_one_solution_that_two_people_have_rated_counts_twice(tmp_path: Path) -> None:
    first, second = load(tmp_path, prm800k([[0], [-1]]), prm800k([[-1]])).solutions
    assert second.id == f"{first.id}.2" and (first.first_error, second.first_error) == (1, 0)


def test_prm800k_of_phase_1_is_refused(tmp_path: Path) -> None:
    row = prm800k([[1], [-1]])
    row["question"]["pre_generated_steps"] = None
    assert "use the files of phase 2" in refusal(tmp_path, row)


@pytest.mark.parametrize("published", ["object", "rows"])
def test_mr_ben_as_on_github_and_as_in_the_hub(tmp_path: Path, published: str) -> None:
    right = {
        **MR_BEN,
        "Sampled_Model": "GPT3.5",
        "Model_Solution_Correctness": "correct",
        "Model_Solution_First_Error_Step": "N/A",
    }
    path = tmp_path / "math.json"
    path.write_text(json.dumps({"u1": [MR_BEN, right]} if published == "object" else [MR_BEN, right], indent=2))
    data = load_labelled(str(path))
    first, second = data.solutions
    assert data.formats == ("mr_ben",)
    assert (first.id, first.first_error, second.id, second.first_error) == ("u1/Claude2", 1, "u1/GPT3.5", None)
    assert (first.question, first.answer, first.generator) == ("1 + 1 + 1?\nA: 3 \nB: 4", "A", "Claude2")
    assert first.reference_solution is None


def test_mr_ben_programs_and_labels_without_a_number_are_left_out_and_counted(tmp_path: Path) -> None:
    program = {**MR_BEN, "Model_Solution_Steps": "def f():\n    pass\n", "Model_Solution_First_Error_Step": "pass"}
    data = load(tmp_path, MR_BEN, program, {**MR_BEN, "Sampled_Model": "x", "Model_Solution_First_Error_Step": ""})
    assert len(data.solutions) == 1
    assert data.left_out == {"a first wrong step that is no number": 1, "a program in place of steps": 1}


def test_mr_gsm8k(tmp_path: Path) -> None:
    (found,) = load(tmp_path, MR_GSM8K).solutions
    assert (found.id, found.first_error, found.answer) == ("u1", 1, "3")
    assert found.reference_solution is not None and found.steps[1] == "Step 2: #### 4"


def test_big_bench_mistake_tells_the_right_answer_and_not_the_models(tmp_path: Path) -> None:
    first, second = load(tmp_path, BIG_BENCH, {**BIG_BENCH, "input": "x", "mistake_index": None}).solutions
    assert (first.question, first.first_error, first.answer) == ("Sort: b a", 0, "a b")
    assert second.first_error is None


def test_bad_rows_are_refused_together_by_line_and_with_what_to_change(tmp_path: Path) -> None:
    said = refusal(
        tmp_path,
        OWN,
        {**OWN, "first_error": 2},
        {**OWN, "steps": []},
        {**OWN, "lable": 1},
        {**OWN, "steps": ["a <answer>1</answer>"], "first_error": 0},
        {key: value for key, value in OWN.items() if key != "first_error"},
    )
    assert "line 2: the first wrong step is 2, counted from 0, and there are 2 steps" in said
    assert "line 3: steps: " in said
    assert "line 4: unknown: 'lable'; remove it (known are question, steps" in said
    assert "line 5: step 1 holds a step or answer tag" in said
    assert "line 6: first_error: missing; write the first wrong step, counted from 0, or null" in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**PROCESSBENCH, "label": "1"}, "label: '1' is no step counted from 0, and not -1"),
        ({**PROCESSBENCH, "label": -2}, "label: -2 is no step"),
        ({**PROCESSBENCH, "problem": " "}, "question: it is blank"),
        ({**MR_GSM8K, "model_output_solution_correctness": "correct"}, "one of the two is wrong"),
        ({**MR_GSM8K, "model_output_solution_first_error_step": "N/A"}, "one of the two is wrong"),
        ({**MR_GSM8K, "model_output_solution_first_error_step": 0}, "it counts from 1"),
        ({"question": "q", "answer": "a"}, "a row of no known form; columns found: 'question', 'answer'"),
        ([1], "not a JSON object"),
    ],
)
def test_a_bad_row_says_what_to_change(tmp_path: Path, row: Any, said: str) -> None:
    found = refusal(tmp_path, row)
    assert "1: " in found and said in found


def test_ids_are_unique(tmp_path: Path) -> None:
    assert "line 2: id 'a' is that of line 1; ids must be unique" in refusal(
        tmp_path, {**OWN, "id": "a"}, {**OWN, "id": "a"}
    )


def test_a_blank_step_is_left_out_and_the_label_moves_with_its_step(tmp_path: Path) -> None:
    (found,) = load(tmp_path, {**OWN, "steps": ["a", " ", "b"], "first_error": 2}).solutions
    assert (found.steps, found.first_error) == (("a", "b"), 1)
    assert "is blank; label a step that says something" in refusal(tmp_path, {**OWN, "steps": ["a", ""]})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "there is no labelled solution in it (no row)"),
        ("question,steps\n", "the file seems to be CSV"),
        ('{\n "a": 1\n}', "an object over several lines; write one object a line"),
        ('{\n "a": [', "not JSON"),
    ],
)
def test_a_file_without_rows_says_why(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ProblemFileError) as refused:
        load_labelled(str(path))
    assert said in str(refused.value)


def test_the_halves_hold_every_question_once_and_never_change(tmp_path: Path) -> None:
    rows = [{**OWN, "question": f"question {number}", "id": str(number)} for number in range(40)]
    data = load(tmp_path, *rows, {**rows[0], "question": "question   0 ", "id": "again"})
    dev = [one.id for one in data.solutions if in_half(one, "dev")]
    assert not [one.id for one in data.solutions if in_half(one, "dev") == in_half(one, "test")]
    assert ("0" in dev) == ("again" in dev) and 10 < len(dev) < 31
    # By SHA-256, so the same on every machine and in every version.
    assert dev[:5] == ["3", "4", "5", "6", "9"]


def test_the_digest_is_that_of_what_is_asked_and_of_the_labels(tmp_path: Path) -> None:
    plain = load(tmp_path, {**OWN, "id": "a"})
    packed = tmp_path / "data.json.gz"
    packed.write_bytes(gzip.compress(json.dumps([{"id": "a", **OWN}]).encode()))
    assert load_labelled(str(packed)).sha256 == plain.sha256
    assert load(tmp_path, {**OWN, "id": "a", "first_error": None}).sha256 != plain.sha256


def test_a_data_set_of_the_hubs_library_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(PROCESSBENCH))
    (folder / "test.jsonl").write_text(json.dumps({**PROCESSBENCH, "label": 0}))
    (row,) = hub_rows(str(folder), "test")
    assert (row.number, row.value["label"], row.value["steps"]) == (1, 0, PROCESSBENCH["steps"])
    with pytest.raises(ConfigError, match="choose one with --split"):
        list(hub_rows(str(folder), None))
    with pytest.raises(ConfigError, match="has no split 'gsm8k'; it has"):
        list(hub_rows(str(folder), "gsm8k"))


def test_a_file_that_is_not_there_is_not_looked_for_in_the_hub(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "none.jsonl", "folder/none.json.gz"):
        with pytest.raises(ConfigError, match="there is no such file"):
            load_labelled(name)


def test_a_name_that_the_hubs_library_cannot_load_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a file nor a data set that the hub gives"):
        list(hub_rows(str(tmp_path / "none"), None))
