"""The critic's judge of answers over HTTP: answers in other words, answers that none can judge, a slow judge."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from stepalign.critique.answers import Grader
from stepalign.plugins import load_grader
from stepalign.types import CritiqueRequest, CritiqueResponse, FailureReason, Verdict
from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.service import CriticService
from support.critic_processes import critic_command, critic_process, write_config
from support.critic_servers import metric, serving, wait_until

pytestmark = pytest.mark.slow

UNDECIDED = "stepalign_critic_answers_unknown_total"


def calls_it_right(question: str, attempt: str) -> str:
    """A critic that copies all and repeats the answer, or gives that in the question."""
    step, _, answer = attempt.partition("</step_1>")
    return f"{step}</step_1><copied/>{question or answer}<verdict>correct</verdict>"


@contextmanager
def critic(grader: Grader) -> Iterator[str]:
    backend = ProgramBackend("agreeing", calls_it_right, "r")
    with serving(CriticService(backend, "lab-v1", grader=grader)) as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        yield url


def critique_of(url: str, written: str, known: str | None, repeated: str | None = None) -> CritiqueResponse:
    attempt = f"<step_1> 1 of 2 </step_1> <answer> {written} </answer>"
    question = f" <answer> {written if repeated is None else repeated} </answer> "
    return asked(url, CritiqueRequest(question=question, attempt=attempt, answer=known))


def asked(url: str, request: CritiqueRequest) -> CritiqueResponse:
    """With time for a grader that takes all it may on a busy machine."""
    answer = httpx.post(f"{url}/v1/critiques", json=request.model_dump(mode="json"), timeout=120)
    return CritiqueResponse.model_validate_json(answer.content)


def test_a_right_answer_in_other_words_is_called_right() -> None:
    with critic(load_grader("math")) as url:
        response = critique_of(url, r"\frac12", "0.5")
        assert response.critique is not None and response.critique.verdict is Verdict.CORRECT
        assert critique_of(url, r"\frac12", "0.5", repeated="1/2").critique is not None
        wrong = critique_of(url, r"\frac13", "0.5")
        assert wrong.failure is not None and wrong.failure.reason is FailureReason.VERDICT_DISAGREES
        assert metric(url, UNDECIDED) == 0
    with critic(load_grader("exact")) as url:
        other = critique_of(url, r"\frac12", "0.5")
        assert other.failure is not None and other.failure.reason is FailureReason.VERDICT_DISAGREES


def test_an_answer_that_nobody_can_judge_is_unknown_and_counted() -> None:
    with critic(load_grader("math")) as url:
        refused = critique_of(url, "9**9**9", "12")
        assert refused.failure is not None and refused.failure.reason is FailureReason.ANSWER_UNKNOWN
        assert "'12'" in refused.failure.detail
        # Of the attempt's answer with the known one, and of the critique's, which is the same.
        assert metric(url, UNDECIDED) == 2
        assert metric(url, 'stepalign_critic_critiques_total{outcome="answer_unknown"}') == 1
        # The attempt's answer may be right, and the critique's is.
        assert critique_of(url, "9**9**9", "12", repeated="12").critique is not None


def test_a_slow_grader_holds_up_nobody_else() -> None:
    asked, let_go = threading.Event(), threading.Event()

    def slow(answer: str, known_answer: str) -> bool:
        asked.set()
        return let_go.wait(60)

    with critic(slow) as url, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(critique_of, url, "5", "5")
        try:
            assert asked.wait(30)
            assert httpx.get(f"{url}/health/live", timeout=30).status_code == 200
            assert not waiting.done()
        finally:
            let_go.set()
        assert waiting.result().critique is not None


def test_a_grader_that_is_sure_to_be_quick_is_asked_without_a_thread() -> None:
    class Quick:
        """Quick where the known answer is a number."""

        def __init__(self) -> None:
            self.threads: set[int] = set()

        def __call__(self, answer: str, known_answer: str, /) -> bool:
            self.threads.add(threading.get_ident())
            return True

        def at_once(self, answer: str, known_answer: str, /) -> bool:
            return known_answer.isdigit()

    loops: set[int] = set()

    class Noting(ProgramBackend):
        def healthy(self) -> bool:
            loops.add(threading.get_ident())
            return super().healthy()

    quick = Quick()
    with serving(CriticService(Noting("agreeing", calls_it_right, "r"), "lab-v1", grader=quick)) as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        assert critique_of(url, "5", "5").critique is not None
        assert quick.threads == loops
        assert critique_of(url, "five", "five").critique is not None
        assert not quick.threads <= loops


def test_the_command_takes_the_configured_grader(tmp_path: Path) -> None:
    command = critic_command(write_config(tmp_path, grader="nobody"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "critic.grader is 'nobody'" in done.stderr
    request = CritiqueRequest(
        question="3 + 4", attempt=r"<step_1> 3 + 4 = 7 </step_1> <answer> \frac{14}{2} </answer>", answer="7"
    )
    reasons: dict[str, str] = {}
    for grader in ("math", "exact"):
        folder = tmp_path / grader
        folder.mkdir()
        with critic_process(write_config(folder, grader=grader)) as (_, url):
            wait_until(lambda url=url: httpx.get(f"{url}/health/ready").status_code == 200)
            response = asked(url, request)
        reasons[grader] = (response.critique or response.failure).model_dump_json()
    assert reasons["math"] != reasons["exact"]
