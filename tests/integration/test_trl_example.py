"""``examples/trl_sdpo.py`` with the installed TRL, the lab's solver, and a critic on a real socket."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
import typer
from safetensors.torch import load_file

from stepalign.client import SyncCriticClient
from stepalign.types import CritiqueRequest, CritiqueResponse
from stepalign_critic.backends import create_backend
from stepalign_critic.service import CriticService
from stepalign_run.config import CriticServerSection
from support.critic_servers import serving, wait_until

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
ASSETS = REPOSITORY / "lab/stepalign_lab/assets"
BATCH = 8


class ObservedService(CriticService):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__(
            create_backend(CriticServerSection(backend="program", checker="lab", prompts="lab-v1")), "lab-v1"
        )
        self.asked: list[CritiqueRequest] = []

    async def critique(self, request: CritiqueRequest) -> CritiqueResponse:
        self.asked.append(request)
        return await super().critique(request)


@pytest.fixture
def service() -> ObservedService:
    return ObservedService()


@pytest.fixture
def url(service: ObservedService) -> Iterator[str]:
    with serving(service) as address:
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        yield address


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    spec = importlib.util.spec_from_file_location("trl_sdpo", REPOSITORY / "examples/trl_sdpo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def batches(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What SDPO handed to the example's builder, and what it got back, batch by batch."""
    seen: list[dict[str, Any]] = []
    build = example.CritiqueTeacher.build

    def observed(teacher: Any, output: dict[str, Any], *given: Any, **named: Any) -> dict[str, Any]:
        made = build(teacher, output, *given, **named)
        seen.append({**output, **made, "problems": named["feedbacks"], "metrics": teacher.last_metrics})
        return made

    monkeypatch.setattr(example.CritiqueTeacher, "build", observed)
    return seen


def train(example: ModuleType, url: str, problems: Path, out: Path, steps: int) -> None:
    example.main(
        problems,
        ASSETS / "solver",
        out,
        url=url,
        prompts="lab-v1",
        steps=steps,
        batch=BATCH,
        samples=4,
        max_new_tokens=64,
        learning_rate=1e-3,
    )


def weights_moved(out: Path) -> bool:
    before, after = (load_file(folder / "model.safetensors") for folder in (ASSETS / "solver", out))
    assert before.keys() == after.keys()
    return any(not torch.equal(before[name], after[name]) for name in before)


def test_each_completion_is_critiqued_for_the_teacher_to_read(
    example: ModuleType,
    service: ObservedService,
    url: str,
    batches: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(example, url, ASSETS / "problems/train.jsonl", tmp_path, steps=2)
    assert capsys.readouterr().out.endswith(f"    {2 * BATCH} taught\n")
    assert [batch["self_distillation_mask"].tolist() for batch in batches] == [[1.0] * BATCH] * 2
    tokenizer = example.AutoTokenizer.from_pretrained(ASSETS / "solver")
    rows = [row for batch in batches for row in rows_of(batch)]
    requests = [request_for(tokenizer, problem, completion) for problem, completion, _ in rows]
    assert sorted(map(repr, service.asked)) == sorted(map(repr, requests))
    with SyncCriticClient(url) as critic:
        for (problem, completion, read), answer in zip(rows, critic.critique_many(requests), strict=True):
            assert isinstance(answer, CritiqueResponse) and answer.context is not None
            prompt = f"<bos><user>question : {problem['question']} critique : {answer.context}<assistant>"
            assert read == tokenizer(prompt, add_special_tokens=False)["input_ids"] + completion
    assert weights_moved(tmp_path)


def rows_of(batch: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[int], list[int]]]:
    """Problem, completion and what the teacher reads, of each rollout; without padding."""
    for row, problem in enumerate(batch["problems"]):
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        read = batch["teacher_input_ids"][row][batch["teacher_attention_mask"][row].bool()]
        yield json.loads(problem), completion.tolist(), read.tolist()


def request_for(tokenizer: Any, problem: dict[str, Any], completion: list[int]) -> CritiqueRequest:
    return CritiqueRequest(
        question=problem["question"],
        attempt=tokenizer.decode(completion, skip_special_tokens=True),
        reference_solution=problem["reference_solution"],
        answer=problem["answer"],
    )


def test_without_a_critique_nothing_is_learned_and_it_is_said_why(
    example: ModuleType,
    url: str,
    batches: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    problems = tmp_path / "problems.jsonl"
    wrong = {"question": "3 + 4 * 7", "answer": "5"}
    impossible = {"question": "3 + 4 *", "answer": "5"}
    problems.write_text(f"{json.dumps(wrong)}\n{json.dumps(impossible)}\n")
    with pytest.raises(typer.Exit) as ended:
        train(example, url, problems, tmp_path / "out", steps=1)
    assert ended.value.exit_code == 1
    assert [batch["self_distillation_mask"].tolist() for batch in batches] == [[0.0] * BATCH]
    shares = {name: value for name, value in batches[0]["metrics"].items() if name.startswith("critic/")}
    assert shares == {"critic/taught": 0.0, "critic/refused": 0.5, "critic/unanswered": 0.5}
    said = capsys.readouterr()
    assert "4 refused: answer_mismatch\n" in said.out and "4 unanswered: CriticRequestError\n" in said.out
    assert "no completion had a critique: nothing was learned\n" in said.err
    assert "8 of 8 completions have no teacher" in caplog.text
    assert "cannot handle this request" in caplog.text
    assert not weights_moved(tmp_path / "out")


def test_a_folder_with_files_is_not_written_to(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(typer.BadParameter, match="is not empty, and is left as it is"):
        train(example, "http://127.0.0.1:1", ASSETS / "problems/train.jsonl", tmp_path, steps=1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
