"""``stepalign critic-quality`` against critics on real sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from structlog.testing import capture_logs
from typer.testing import CliRunner

from stepalign.commands.application import build_app
from stepalign.errors import ConfigError, CriticUnavailableError
from stepalign_critic.app import AppSettings
from stepalign_critic.http.access import ApiKeys
from stepalign_run.folder.ownership import NotOursError
from support.critic_servers import serving, wait_until
from support.labelled import critique_by_word, solution, word_critic
from support.page_runs import write_run

ROWS = [
    solution(1, "step1", 0, generator="m1"),
    solution(2, "step2", 1, generator="m1"),
    # A step too late.
    solution(3, "step3", 1, generator="m2"),
    # Only the answer: people label the step that states it.
    solution(4, "answer", 2, generator="m2"),
    solution(5, "right", 0, generator="m2"),
    solution(6, "garbage", 0, generator="m2"),
    solution(7, "right", None, generator="m1"),
    solution(8, "unjustified", None, generator="m1"),
    solution(9, "step1", None, generator="m1"),
    solution(10, "unable", None, generator="m2"),
]
# Of no critique the service asks a second time.
ASKED_ONCE = [row for row in ROWS if "garbage" not in row["question"]]
ON_ERRONEOUS, ON_CORRECT = 100 * 3 / 6, 100 * 2 / 4


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """The critics of this module log in the process whose output is read."""
    with capture_logs():
        yield


@contextmanager
def critic(
    name: str = "words",
    critique: Callable[[str, str], str] = critique_by_word,
    keys: ApiKeys | None = None,
    settings: str | None = None,
) -> Iterator[str]:
    with serving(word_critic(name, critique, settings), AppSettings(api_keys=keys)) as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with critic() as address:
        yield address


def file_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def invoke(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(build_app("critic-quality"), ["critic-quality", *words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def measured(*words: str, code: int = 0) -> dict[str, Any]:
    return json.loads(invoke(*words, "--json", code=code).stdout)


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def test_every_figure_is_that_of_the_known_pattern(url: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = measured(file_of(tmp_path, ROWS), "--url", url, "--out", str(out))
    (one,) = found["critics"]
    figures = one["figures"]
    assert one["critic"] == {
        "model": "words",
        "weights_revision": "r1",
        "prompt_version": "chat-v1",
        "backend": "program",
        "settings": None,
    }
    assert (figures["rows"], figures["erroneous"], figures["correct"], figures["questions"]) == (10, 6, 4, 10)
    assert figures["on_erroneous"]["value"] == ON_ERRONEOUS and figures["on_correct"]["value"] == ON_CORRECT
    assert figures["f1"]["value"] == 50.0
    # Five of the six erroneous have an answer, four of them are called wrong, three at the right place.
    assert figures["detected"]["value"] == pytest.approx(100 * 4 / 6, abs=1e-3)
    assert figures["place_accuracy"]["value"] == 75.0
    assert figures["valid"]["value"] == 80.0
    assert figures["failures"] == {"refused_unsupported_request": 1, "unparseable": 1}
    assert figures["f1"]["low"] < 50 < figures["f1"]["high"]
    assert figures["seconds"]["value"] > 0 and figures["prompt_tokens"]["value"] == 0
    assert figures["calibration"] is None
    assert {group["name"]: group["rows"] for group in figures["by_generator"]} == {"m1": 5, "m2": 5}
    assert [group["name"] for group in figures["by_steps"]] == ["1–3"]
    assert json.loads((out / "critic_quality.json").read_text()) == found
    assert len(answers(out / "rows.jsonl")) == 10


def test_the_table_has_the_figures_and_the_page_is_named(url: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = invoke(file_of(tmp_path, ROWS), "--url", url, "--out", str(out)).output
    assert "50.0 (" in shown and "refused_unsupported_request" in shown and "words, failures 2: 10 of 10" in shown
    assert "m2" in shown and str(out / "report.html") in shown.replace("\n", "")
    assert "critic on labelled.jsonl" in (out / "report.html").read_text(encoding="utf-8")


def test_a_step_that_is_nothing_but_the_answer_keeps_the_places_of_the_others(url: str, tmp_path: Path) -> None:
    """It is a step like the others where the steps were sent one by one."""
    rows = [
        {"question": "3 + 4? step3", "steps": ["3 + 4 = 7", "#### 7", "So it is, they say."], "first_error": 2},
        {"question": "3 + 5? answer", "steps": ["3 + 5 = 8", "#### 9"], "first_error": 1},
    ]
    figures = measured(file_of(tmp_path, rows), "--url", url, "--out", str(tmp_path / "out"))["critics"][0]["figures"]
    assert figures["on_erroneous"]["value"] == 100.0 and figures["f1"] is None


@pytest.mark.parametrize(
    ("options", "told"),
    [([], ("given", "8")), (["--without-reference"], (None, "8")), (["--without-answer"], ("given", None))],
)
def test_the_critic_is_told_what_the_options_leave(options: list[str], told: tuple[Any, Any], tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []
    service = word_critic()
    inner = service.critique

    async def recorded(request: Any) -> Any:
        bodies.append(request.model_dump())
        return await inner(request)

    service.critique = recorded  # pyright: ignore[reportAttributeAccessIssue]
    with serving(service) as address:
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        row = solution(7, "right", None, reference_solution="given", answer="8")
        found = measured(file_of(tmp_path, [row]), "--url", address, "--out", str(tmp_path / "out"), *options)
    (body,) = bodies
    assert (body["reference_solution"], body["answer"]) == told
    assert body["steps"] == row["steps"]
    assert found["critics"][0]["told"] == {"reference_solution": told[0] is not None, "answer": told[1] is not None}


def test_a_rerun_asks_for_nothing_that_is_there(tmp_path: Path) -> None:
    asked: list[str] = []

    def counting(question: str, attempt: str) -> str:
        asked.append(question)
        return critique_by_word(question, attempt)

    data, out = file_of(tmp_path, ASKED_ONCE), str(tmp_path / "out")
    with critic(critique=counting) as address:
        first = measured(data, "--url", address, "--out", out, "--limit", "4")
        assert len(asked) == 4 and first["chosen"] == {"half": None, "limit": 4, "solutions": 4}
        measured(data, "--url", address, "--out", out)
        assert len(asked) == len(set(asked)) == 9
        again = measured(data, "--url", address, "--out", out)
    assert len(asked) == 9
    # All is there: no critic is needed any more.
    after = invoke(data, "--url", address, "--out", out, "--json", "--timeout", "1")
    assert json.loads(after.stdout) == again and "all answers are there already" in after.stderr


def test_a_measurement_goes_on_after_a_kill_in_the_middle(tmp_path: Path) -> None:
    gate, asked = threading.Event(), []

    def gated(question: str, attempt: str) -> str:
        asked.append(question)
        if len(asked) > 4 and not gate.is_set():
            gate.wait(60)
        return critique_by_word(question, attempt)

    data, out = file_of(tmp_path, ASKED_ONCE), tmp_path / "out"
    with critic(critique=gated) as address:
        words = ["critic-quality", data, "--url", address, "--out", str(out), "--concurrency", "1"]
        process = subprocess.Popen([sys.executable, "-m", "stepalign.cli", *words], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: len(asked) == 5, 60)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = answers(out / "rows.jsonl")
        assert len(kept) == 4 and not (out / "critic_quality.json").exists()
        # A kill amid a line: the row counts as not there.
        with (out / "rows.jsonl").open("a") as file:
            file.write('{"id": "s-')
        gate.set()
        found = measured(data, "--url", address, "--out", str(out), "--concurrency", "1")
    assert found["critics"][0]["figures"]["on_erroneous"]["value"] == 60.0
    assert answers(out / "rows.jsonl")[:4] == kept and len(answers(out / "rows.jsonl")) == 9
    # Once each, but for the one that was asked for when the command was killed.
    assert len(asked) == 10 and len(set(asked)) == 9


@pytest.mark.parametrize("other", ["critic", "settings", "data", "told"])
def test_answers_of_another_kind_are_never_mixed(url: str, other: str, tmp_path: Path) -> None:
    data, out = file_of(tmp_path, ROWS[:3]), str(tmp_path / "out")
    measured(data, "--url", url, "--out", out)
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    with critic("others") as another, critic(settings="0b61e7f2") as changed:
        words = {
            "critic": [data, "--url", another],
            "settings": [data, "--url", changed],
            "data": [file_of(tmp_path / "..", ROWS[:2]), "--url", url],
            "told": [data, "--url", url, "--without-answer"],
        }[other]
        with pytest.raises(ConfigError) as refused:
            invoke(*words, "--out", out)
    named = {
        "critic": '"others"',
        "settings": '"settings": "0b61e7f2"',
        "data": "data (labelled.jsonl",
        "told": "without answer",
    }[other]
    assert named in str(refused.value) and "give another --out".lower() in str(refused.value).lower()
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before


def test_a_folder_with_files_that_are_not_ours_is_left_as_it_is(url: str, tmp_path: Path) -> None:
    data = file_of(tmp_path, ROWS[:1])
    for name in ("rows.jsonl", "critic_quality.json", "report.html"):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("mine\n")
        with pytest.raises(NotOursError):
            invoke(data, "--url", url, "--out", str(out))
        assert [(path.name, path.read_text()) for path in out.iterdir() if path.is_file() and path.stat().st_size] == [
            (name, "mine\n")
        ]


def test_a_call_that_fails_is_no_answer_and_is_asked_for_again(tmp_path: Path) -> None:
    broken = threading.Event()
    broken.set()

    def mended(question: str, attempt: str) -> str:
        if broken.is_set() and question.startswith("What is 2 "):
            raise RuntimeError("out of memory")
        return critique_by_word(question, attempt)

    data, words = file_of(tmp_path, ROWS), ["--out", str(tmp_path / "out"), "--timeout", "5"]
    with critic(critique=mended) as address:
        first = invoke(data, "--url", address, *words, code=75)
        assert "out of memory" in first.output.replace("\n", " ")
        assert "1 solutions have no answer yet and are in no figure; run it again" in first.output.replace("\n", " ")
        broken.clear()
        assert measured(data, "--url", address, *words)["critics"][0]["unanswered"] == 0


def test_a_critic_that_is_gone_ends_the_asking_and_keeps_the_answers(tmp_path: Path) -> None:
    data, out = file_of(tmp_path, ROWS), tmp_path / "out"
    with critic() as address:
        measured(data, "--url", address, "--out", str(out), "--limit", "2")
    with pytest.raises(CriticUnavailableError):
        invoke(data, "--url", address, "--out", str(out), "--timeout", "0.5")
    assert len(answers(out / "rows.jsonl")) == 2


def test_the_key_comes_from_a_file_and_a_wrong_one_is_said_at_once(tmp_path: Path) -> None:
    data = file_of(tmp_path, ROWS[:2])
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("k" * 32)
    wrong.write_text("w" * 32)
    with critic(keys=ApiKeys(["k" * 32])) as address:
        words = [data, "--url", address, "--out", str(tmp_path / "out"), "--api-key-file"]
        done = subprocess.run(
            [sys.executable, "-m", "stepalign.cli", "critic-quality", *words, str(wrong)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert done.returncode == 1 and "401" in done.stderr and len(done.stderr.splitlines()) == 1
        assert measured(*words, str(right))["critics"][0]["figures"]["rows"] == 2


def test_two_critics_side_by_side_and_the_same_from_kept_answers(url: str, tmp_path: Path) -> None:
    def always_right(question: str, attempt: str) -> str:
        return critique_by_word("right", attempt)

    rows = [solution(n, "step1", 0) for n in range(1, 7)] + [solution(n, "right", None) for n in range(7, 11)]
    data, both = file_of(tmp_path, rows), tmp_path / "both"
    with critic("lenient", always_right) as lenient:
        found = measured(data, "--url", url, "--url", lenient, "--out", str(both))
        alone = tmp_path / "alone"
        measured(data, "--url", lenient, "--out", str(alone))
    a, b = (each["figures"]["f1"]["value"] for each in found["critics"])
    assert (a, b) == (100.0, 0.0) and [each["label"] for each in found["critics"]] == ["A", "B"]
    comparison = found["comparison"]
    assert comparison["rows"] == 10 and comparison["f1_difference"] == {"value": 100.0, "low": 100.0, "high": 100.0}
    assert comparison["f1_ratio"] is None
    for kept in (alone, alone / "rows.jsonl"):
        again = measured(data, "--url", url, "--out", str(tmp_path / "against"), "--against", str(kept))
        assert again["comparison"] == comparison
    shown = invoke(data, "--url", url, "--out", str(tmp_path / "against"), "--against", str(alone)).output
    assert "A beside B on 10 solutions" in shown


def test_answers_to_other_data_stand_beside_nothing(url: str, tmp_path: Path) -> None:
    measured(file_of(tmp_path, ROWS[:2]), "--url", url, "--out", str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="holds answers to other data"):
        words = ["--out", str(tmp_path / "out"), "--against", str(tmp_path / "other")]
        invoke(file_of(tmp_path, ROWS[:3]), "--url", url, *words)


def test_options_that_do_not_fit_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    data = file_of(tmp_path, ROWS)
    nobody = ["--url", "http://127.0.0.1:9"]
    for words, said in (
        (nobody * 3, "--url is given 3 times"),
        ([*nobody * 2, "--against", "x"], "--url twice or --against"),
        ([*nobody, "--api-key-file", "a", "--api-key-file", "b"], "--api-key-file once"),
    ):
        with pytest.raises(ConfigError, match=said):
            invoke(data, *words, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_halves_part_the_rows(url: str, tmp_path: Path) -> None:
    data, out = file_of(tmp_path, ROWS), ["--url", url, "--out", str(tmp_path / "out")]
    dev, test = (measured(data, *out, "--half", half)["chosen"] for half in ("dev", "test"))
    assert (dev["half"], test["half"]) == ("dev", "test") and dev["solutions"] + test["solutions"] == 10
    assert 0 < dev["solutions"] < 10


def test_bad_rows_are_refused_together_before_anything_is_asked(tmp_path: Path) -> None:
    bad = [{**ROWS[0], "first_error": 7}, ROWS[1], {**ROWS[2], "steps": "one"}]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "stepalign.cli",
            "critic-quality",
            file_of(tmp_path, bad),
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "line 1: the first wrong step is 7" in done.stderr and "line 3: steps" in done.stderr


def test_in_the_folder_of_a_run_its_page_shows_the_critic_too(url: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo", name="demo", steps=10, tokens=False)
    measured(file_of(tmp_path, ROWS), "--url", url, "--out", str(folder))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>stepalign · demo</title>" in page and '"on_erroneous":{"value":50.0' in page
