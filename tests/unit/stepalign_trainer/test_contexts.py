"""Contexts and the critic's failures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from stepalign.errors import ConfigError, CriticError, CriticRequestError, CriticUnavailableError
from stepalign.types import CritiqueRequest, CritiqueResponse
from stepalign_lab.checker import exact_critique
from stepalign_run.config import CriticClientSection
from stepalign_run.context import ContextKind
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch import critiques as critiques_module
from stepalign_trainer.batch.contexts import CONTEXTS, ContextResult, Contexts
from stepalign_trainer.batch.critiques import open_critic
from support.critic_answers import answer_of

MakeRollout = Callable[..., Rollout]
Answer = Callable[[CritiqueRequest], Awaitable[str]]


class Critic:
    """A critic in this process: ``answer`` writes the critic's text, which is validated as the service does."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer = answer
        self.requests: list[tuple[str | None, CritiqueRequest]] = []
        self.running = 0
        self.most_at_once = 0

    async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
        self.requests.append((request_id, request))
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            if self.answer is not None:
                text = await self.answer(request)
            else:
                text = exact_critique(request.question, request.split().tagged)
        finally:
            self.running -= 1
        return answer_of(request, text)


def fetch(critic: Critic, rollouts: list[Rollout], kind: ContextKind = ContextKind.CRITIQUE) -> list[ContextResult]:
    async def work() -> list[ContextResult]:
        async with asyncio.timeout(60):
            return await Contexts(kind, critic, concurrency=3).fetch(rollouts)

    return asyncio.run(work())


def raising(error: Exception) -> Critic:
    async def answer(_: CritiqueRequest) -> str:
        raise error

    return Critic(answer)


def test_a_critique_becomes_the_context_of_its_rollout(rollout_of: MakeRollout) -> None:
    names = ["right", "wrong_step", "missing_step", "unfinished"]
    rollouts = [rollout_of(name, "length" if name == "unfinished" else "stop", rollout_id=name) for name in names]
    critic = Critic()
    results = fetch(critic, rollouts)
    assert [r.critique_outcome for r in results] == ["correct", "incorrect", "unjustified", "incomplete"]
    assert [r.skip_reason for r in results] == [None] * 4
    right = rollouts[0].text
    assert [r.context.text for r in results if r.context] == [right] * 4  # what each should have written
    assert all(r.context and r.critique and r.context.text == r.critique.text for r in results)
    assert {r.context.kind for r in results if r.context} == {ContextKind.CRITIQUE}
    sent = dict(critic.requests)
    assert sent.keys() == set(names)
    problem = rollouts[1].problem
    assert sent["wrong_step"] == CritiqueRequest(
        question=problem.question,
        attempt=rollouts[1].text,
        reference_solution=problem.reference_solution,
        answer=problem.answer,
    )


def test_an_unaligned_critique_is_skipped_under_its_reason(rollout_of: MakeRollout) -> None:
    async def describe(_: CritiqueRequest) -> str:
        return "Steps 1 to 3 are correct."

    (result,) = fetch(Critic(describe), [rollout_of("right")])
    assert result == ContextResult(None, skip_reason="critique_unparseable", critique_outcome="unparseable")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CriticRequestError("too long", status=413, code="prompt_too_long"), "critic_refused_prompt_too_long"),
        (CriticRequestError("no", status=422), "critic_refused_422"),
        (CriticError("not JSON"), "critic_error"),
    ],
)
def test_a_refusing_critic_costs_its_rollout_under_a_reason(
    rollout_of: MakeRollout, error: CriticError, reason: str
) -> None:
    critic = raising(error)
    assert fetch(critic, [rollout_of("right")]) == [ContextResult(None, skip_reason=reason, critique_outcome=reason)]
    assert len(critic.requests) == 1  # not asked again


def test_an_unavailable_critic_is_waited_for_and_nothing_is_lost(
    rollout_of: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(critiques_module, "RETRY_SECONDS", 0.01)
    attempts: Counter[str] = Counter()

    async def answer(request: CritiqueRequest) -> str:
        attempts[request.split().tagged] += 1
        if attempts[request.split().tagged] <= 4:
            raise CriticUnavailableError("draining", retry_after=0.01 if attempts[request.split().tagged] % 2 else None)
        return exact_critique(request.question, request.split().tagged)

    rollouts = [rollout_of(name) for name in ("right", "wrong_step", "wrong_answer", "missing_step", "missing_last")]
    results = fetch(Critic(answer), rollouts)
    assert attempts == {rollout.text: 5 for rollout in rollouts}
    verdicts = ["correct", "incorrect", "incorrect", "unjustified", "unjustified"]
    assert [r.critique_outcome for r in results] == verdicts


def timeouts_then(count: int, asked: list[float]) -> Callable[[CritiqueRequest], Awaitable[str]]:
    """A critic whose engine takes too long ``count`` times; ``asked`` are the times of the questions."""

    async def answer(request: CritiqueRequest) -> str:
        asked.append(time.monotonic())
        if len(asked) <= count:
            raise CriticUnavailableError("slow", retry_after=0.02, code="engine_timeout")
        return exact_critique(request.question, request.split().tagged)

    return answer


def test_a_critique_that_takes_too_long_is_asked_for_again_after_ever_longer_pauses(rollout_of: MakeRollout) -> None:
    asked: list[float] = []
    (result,) = fetch(Critic(timeouts_then(4, asked)), [rollout_of("right")])
    assert result.context is not None and result.critique_outcome == "correct"
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert all(pause >= least for pause, least in zip(pauses, (0.02, 0.04, 0.08, 0.16), strict=True))


def test_a_critique_that_always_takes_too_long_costs_its_rollout_under_a_reason(rollout_of: MakeRollout) -> None:
    asked: list[float] = []
    slow, reason = timeouts_then(99, asked), "critic_timeout"
    results = fetch(Critic(slow), [rollout_of("right")])
    assert results == [ContextResult(None, skip_reason=reason, critique_outcome=reason)]
    assert len(asked) == critiques_module.TIMEOUT_TRIES


def test_the_critics_own_delay_is_kept(rollout_of: MakeRollout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(critiques_module, "RETRY_SECONDS", 60.0)
    asked: list[int] = []

    async def answer(request: CritiqueRequest) -> str:
        asked.append(1)
        if len(asked) == 1:
            raise CriticUnavailableError("saturated", retry_after=0.01)
        return exact_critique(request.question, request.split().tagged)

    assert fetch(Critic(answer), [rollout_of("right")])[0].context is not None


def test_no_more_requests_run_at_once_than_configured(rollout_of: MakeRollout) -> None:
    async def answer(request: CritiqueRequest) -> str:
        await asyncio.sleep(0.01)
        return exact_critique(request.question, request.split().tagged)

    critic = Critic(answer)
    results = fetch(critic, [rollout_of("right", rollout_id=f"r{i}") for i in range(8)])
    assert critic.most_at_once == 3 and len(results) == len(critic.requests) == 8


def test_results_keep_the_order_of_the_rollouts(rollout_of: MakeRollout) -> None:
    async def answer(request: CritiqueRequest) -> str:
        await asyncio.sleep(0.02 if "7 * 7 = 8" in request.split().tagged else 0.0)
        return exact_critique(request.question, request.split().tagged)

    results = fetch(Critic(answer), [rollout_of("wrong_step"), rollout_of("right")])
    assert [r.critique_outcome for r in results] == ["incorrect", "correct"]


def test_reference_and_null_contexts_ask_no_critic(rollout_of: MakeRollout) -> None:
    critic = Critic()
    bare = rollout_of("right").problem.model_copy(update={"reference_solution": None})
    rollouts = [rollout_of("wrong_step"), rollout_of("right", problem=bare)]
    with_reference, without = fetch(critic, rollouts, ContextKind.REFERENCE)
    assert with_reference.context and with_reference.context.text == rollouts[0].problem.reference_solution
    assert without == ContextResult(None, skip_reason="no_reference_solution")
    nothing = fetch(critic, rollouts, ContextKind.NULL)
    assert [r.context.text for r in nothing if r.context] == ["", ""]
    assert critic.requests == [] and with_reference.critique_outcome is None


class _Records(BaseHTTPRequestHandler):
    """A critic that is ready and critiques, and notes the key of each request."""

    def do_GET(self) -> None:
        self._answer(200, b"{}")

    def do_POST(self) -> None:
        request = CritiqueRequest.model_validate_json(self.rfile.read(int(self.headers["content-length"])))
        response = answer_of(request, exact_critique(request.question, request.split().tagged))
        self._answer(200, response.model_dump_json().encode())

    def _answer(self, status: int, body: bytes) -> None:
        key = self.headers.get("authorization")
        self.server.seen.append((self.command, self.path, key))  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """No log."""


@pytest.fixture
def recording() -> Iterator[tuple[str, list[tuple[str, str, str | None]]]]:
    """Address of a critic, and method, path and key of each request to it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Records) as server:
        server.daemon_threads = True
        server.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", server.seen  # type: ignore[attr-defined]
        server.shutdown()


@pytest.mark.parametrize("key", ["sk-of-the-file", None])
def test_the_key_of_the_file_goes_with_every_request(
    recording: tuple[str, list[tuple[str, str, str | None]]], tmp_path: Path, rollout_of: MakeRollout, key: str | None
) -> None:
    address, seen = recording
    (tmp_path / "key").write_text(f"# of the trainer\n{key}\n")
    settings = CriticClientSection(url=address, api_key_file=tmp_path / "key" if key is not None else None)

    async def work() -> ContextResult:
        critic = open_critic(settings)
        assert critic is not None
        async with critic:
            await critiques_module.await_critic(critic)
            return (await Contexts(ContextKind.CRITIQUE, critic, concurrency=1).fetch([rollout_of("wrong_step")]))[0]

    assert asyncio.run(work()).critique_outcome == "incorrect"
    bearer = f"Bearer {key}" if key is not None else None
    assert seen == [("GET", "/health/ready", bearer), ("POST", "/v1/critiques", bearer)]


def test_without_an_address_there_is_no_critic_and_its_key_is_not_read(tmp_path: Path) -> None:
    settings = CriticClientSection(api_key_file=tmp_path / "none")
    assert open_critic(settings) is None


@pytest.mark.parametrize("content", [None, "", "sk-1\nsk-2\n", "sk 1\n"])
def test_a_key_that_cannot_be_read_is_a_configuration_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"^critic\.api_key_file: .*key") as caught:
        open_critic(CriticClientSection(url="http://127.0.0.1:1", api_key_file=path))
    assert "sk" not in str(caught.value).replace(str(path), "")


def test_the_configured_deadline_is_the_clients() -> None:
    critic = open_critic(CriticClientSection(url="http://127.0.0.1:1", timeout_seconds=0.01))
    assert critic is not None

    async def work() -> None:
        async with critic, asyncio.timeout(10):
            await critic.critique(CritiqueRequest(question="1 + 1", attempt="2"))

    with pytest.raises(CriticUnavailableError, match=r"in 0\.01 s"):
        asyncio.run(work())


MIXED = ["wrong_step", "right", "other_wrong", "other_right", "missing_step"]


def mixed(rollout_of: MakeRollout) -> list[Rollout]:
    """Attempts at two problems, between one another."""
    return [rollout_of(name, rollout_id=name) for name in MIXED]


def test_another_problems_reference_is_never_that_of_the_same_problem(rollout_of: MakeRollout) -> None:
    rollouts = mixed(rollout_of)
    references = {rollout.problem.id: rollout.problem.reference_solution for rollout in rollouts}
    results = fetch(Critic(), rollouts, ContextKind.OTHER_PROBLEM)
    assert [r.context.text for r in results if r.context] == [
        references["p1" if rollout.problem.id == "p0" else "p0"] for rollout in rollouts
    ]
    alone = fetch(Critic(), [rollouts[0], rollouts[1]], ContextKind.OTHER_PROBLEM)
    assert alone == [ContextResult(None, skip_reason="no_other_reference")] * 2
    bare = rollouts[2].problem.model_copy(update={"reference_solution": None})
    without = fetch(Critic(), [rollouts[0], rollout_of("other_right", problem=bare)], ContextKind.OTHER_PROBLEM)
    assert without[0].skip_reason == "no_other_reference" and without[1].context is not None


def test_a_shuffled_critique_is_that_of_another_problems_rollout(rollout_of: MakeRollout) -> None:
    rollouts = mixed(rollout_of)
    own = {rollout.rollout_id: r.critique for rollout, r in zip(rollouts, fetch(Critic(), rollouts), strict=True)}
    results = fetch(Critic(), rollouts, ContextKind.SHUFFLED_CRITIQUE)
    texts = {name: critique.text for name, critique in own.items() if critique is not None}
    right_of = {"p0": texts["right"], "p1": texts["other_right"]}
    assert right_of["p0"] != right_of["p1"]
    for rollout, result in zip(rollouts, results, strict=True):
        assert result.context is not None and result.context.kind is ContextKind.SHUFFLED_CRITIQUE
        assert result.context.text == right_of["p1" if rollout.problem.id == "p0" else "p0"]
        assert result.critique == own[rollout.rollout_id]  # where the error is, comes from the rollout's own
    alone = fetch(Critic(), rollouts[:2], ContextKind.SHUFFLED_CRITIQUE)
    assert [r.skip_reason for r in alone] == ["no_other_critique"] * 2
    assert [r.critique_outcome for r in alone] == ["incorrect", "correct"]


def test_a_refused_critique_is_shuffled_to_nobody(rollout_of: MakeRollout) -> None:
    async def answer(request: CritiqueRequest) -> str:
        return (
            "no critique"
            if "2 * 3 = 5" in request.split().tagged
            else exact_critique(request.question, request.split().tagged)
        )

    only, refused = fetch(Critic(answer), mixed(rollout_of)[0:3:2], ContextKind.SHUFFLED_CRITIQUE)
    assert (only.context, only.skip_reason) == (None, "no_other_critique")
    assert (refused.context, refused.skip_reason) == (None, "critique_unparseable")


@pytest.mark.parametrize(
    ("attempt", "quoted"),
    [
        ("wrong_step", "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 8 </step_2> <step_2> 7 * 7 = 9 </step_2> "),
        ("wrong_answer", "<step_4> 7 + 1 = 8 </step_4> <answer> 5 </answer> <answer> 8 </answer>"),
        ("early_answer", "<step_1> 3 + 4 = 7 </step_1> <answer> 5 </answer> <step_2> 7 * 7 = 9 </step_2> "),
        ("unfinished_wrong", "<step_1> 3 + 4 = 7 </step_1> <step_2> 7 + <step_2> 7 * 7 = 9 </step_2> "),
        ("<step_1> 3 - 4 = 7 </step_1>", "<step_1> 3 - 4 = 7 </step_1> <step_1> 3 + 4 = 7 </step_1> <step_2> "),
    ],
)
def test_full_repetition_quotes_what_is_wrong_before_its_correction(
    rollout_of: MakeRollout, attempt: str, quoted: str
) -> None:
    (result,) = fetch(Critic(), [rollout_of(attempt)], ContextKind.FULL_REPETITION)
    assert result.context is not None and result.critique is not None
    assert quoted in result.context.text and quoted not in result.critique.text
    # Nothing else is changed: without the quotation it is the critique.
    assert result.critique.alignment.first_difference is not None
    wrong = rollout_of(attempt).text[slice(*result.critique.alignment.first_difference)]
    assert result.context.text.replace(f"{wrong} ", "", 1) == result.critique.text


def test_omission_holds_no_step_before_the_first_difference(rollout_of: MakeRollout) -> None:
    names = ["wrong_step", "wrong_answer", "right", "unfinished", "missing_step"]
    rollouts = [rollout_of(name, "length" if name == "unfinished" else "stop") for name in names]
    results = fetch(Critic(), rollouts, ContextKind.OMISSION)
    rest = "<step_3> 9 - 2 = 7 </step_3> <step_4> 7 + 1 = 8 </step_4> <answer> 8 </answer>"
    assert [r.context.text for r in results if r.context] == [
        f"<step_2> 7 * 7 = 9 </step_2> {rest}",
        "<answer> 8 </answer>",
        "<answer> 8 </answer>",
        f"<step_2> 7 * 7 = 9 </step_2> {rest}",
        f"<step_2> 7 * 7 = 9 </step_2> {rest}",
    ]


@pytest.mark.parametrize("kind", [ContextKind.FULL_REPETITION, ContextKind.OMISSION])
def test_what_calls_nothing_wrong_is_not_quoted(rollout_of: MakeRollout, kind: ContextKind) -> None:
    (result,) = fetch(Critic(), [rollout_of("right")], kind)
    text = rollout_of("right").text
    assert result.context is not None
    assert result.context.text == (text if kind is ContextKind.FULL_REPETITION else "<answer> 8 </answer>")


@pytest.mark.parametrize("kind", [ContextKind.NULL, ContextKind.REFERENCE, ContextKind.OTHER_PROBLEM])
def test_a_checker_tells_where_errors_are_in_arms_without_a_critic(rollout_of: MakeRollout, kind: ContextKind) -> None:
    rollouts = mixed(rollout_of)
    checked = asyncio.run(Contexts(kind, None, 1, exact_critique).fetch(rollouts))
    assert [r.critique.verdict.value for r in checked if r.critique] == [
        *("incorrect", "correct", "incorrect", "correct", "unjustified")
    ]
    assert {r.critique_outcome for r in checked} == {None}  # no critic was asked
    bare = asyncio.run(Contexts(kind, None, 1).fetch(rollouts))
    assert [r.critique for r in bare] == [None] * 5
    assert [r.context for r in bare] == [r.context for r in checked]


def test_a_checker_that_cannot_handle_a_problem_is_a_configuration_error(rollout_of: MakeRollout) -> None:
    strange = rollout_of("right").problem.model_copy(update={"id": "p9", "question": "How many?"})
    contexts = Contexts(ContextKind.NULL, None, 1, exact_critique)
    with pytest.raises(ConfigError, match=r"data\.checker cannot handle problem 'p9'"):
        asyncio.run(contexts.fetch([rollout_of("right", problem=strange)]))


def test_every_kind_has_a_class_and_a_file_in_every_prompt_set() -> None:
    assert CONTEXTS.keys() == set(ContextKind)
    shipped = [folder for folder in files("stepalign.prompts").iterdir() if (folder / "student.txt").is_file()]
    assert len(shipped) >= 2
    for made in CONTEXTS.values():
        assert made.prompt is None or all((folder / f"{made.prompt}.txt").is_file() for folder in shipped)


def test_a_kind_made_from_critiques_needs_a_critic() -> None:
    assert [kind.value for kind in ContextKind if not kind.needs_critic] == ["reference", "null", "other_problem"]
    for kind in (
        ContextKind.CRITIQUE,
        ContextKind.SHUFFLED_CRITIQUE,
        ContextKind.FULL_REPETITION,
        ContextKind.OMISSION,
    ):
        with pytest.raises(ConfigError, match=r"critic\.url is not set"):
            Contexts(kind, None, 1, exact_critique)
