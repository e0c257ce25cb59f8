"""The critique cache alone: one generation for equal requests, whoever asks and whoever hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from structlog.testing import capture_logs

from stepalign.prompts import Prompt, load_prompt
from stepalign.types import CriticIdentity, CritiqueMode, CritiqueRequest, CritiqueResponse
from stepalign_critic.cache import CritiqueCache, Found, Source
from stepalign_critic.cache.store import StoreUnavailableError
from stepalign_critic.service import CriticService
from stepalign_critic.tenant import set_key
from stepalign_run.config import CriticServerSection, OpenAISection, VllmSection
from support.critic_answers import answer_of
from support.critic_servers import GatedBackend

T = TypeVar("T")
REQUEST = CritiqueRequest(question="q", attempt="<step_1>a</step_1>", answer="1")
ANSWER = answer_of(REQUEST, "no critique")


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def main() -> T:
        return await asyncio.wait_for(work(), 20)

    return asyncio.run(main())


class Maker:
    """Makes answers once ``gate`` is open, and counts."""

    def __init__(self) -> None:
        self.made = self.cancelled = 0
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> CritiqueResponse:
        self.made += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return ANSWER


def test_a_hundred_equal_requests_make_one_generation() -> None:
    async def work() -> tuple[int, list[Source]]:
        cache, make = CritiqueCache(8), Maker()
        tasks = [asyncio.create_task(cache.get_or_make("k", make)) for _ in range(100)]
        await asyncio.sleep(0)
        make.gate.set()
        found = await asyncio.gather(*tasks)
        assert all(each.response == ANSWER for each in found)
        return make.made, [each.source for each in found] + [(await cache.get_or_make("k", make))[1]]

    made, sources = run(work)
    assert made == 1 and sources == [Source.MISS, *[Source.JOINED] * 99, Source.HIT]


def test_an_answer_is_cancelled_when_all_have_hung_up_and_not_before() -> None:
    async def work() -> None:
        cache, make = CritiqueCache(8), Maker()
        tasks = [asyncio.create_task(cache.get_or_make("k", make)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        assert make.cancelled == 0 and not tasks[2].done()
        tasks[2].cancel()
        late = asyncio.create_task(cache.get_or_make("k", make))
        await asyncio.sleep(0.01)
        assert (make.made, make.cancelled) == (2, 1)
        joined = asyncio.create_task(cache.get_or_make("k", make))
        await asyncio.sleep(0.01)
        make.gate.set()
        assert [(await late)[1], (await joined)[1]] == [Source.MISS, Source.JOINED]
        assert make.made == 2

    run(work)


def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    async def work() -> None:
        cache, make = CritiqueCache(8), Maker()
        make.error = RuntimeError("broken")
        make.gate.set()
        found = await asyncio.gather(*(cache.get_or_make("k", make) for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in found] == ["broken"] * 3 and make.made == 1
        make.error = None
        assert (await cache.get_or_make("k", make))[1] is Source.MISS

    run(work)


def test_the_least_recently_used_answer_goes_first() -> None:
    async def work() -> list[Source]:
        cache, make = CritiqueCache(2), Maker()
        make.gate.set()
        return [(await cache.get_or_make(key, make))[1] for key in ("a", "b", "a", "c", "a", "b")]

    miss, hit = Source.MISS, Source.HIT
    assert run(work) == [miss, miss, hit, miss, hit, miss]


def test_with_no_entries_only_equal_requests_at_the_same_time_share() -> None:
    async def work() -> int:
        cache, make = CritiqueCache(0), Maker()
        make.gate.set()
        await asyncio.gather(*(cache.get_or_make("k", make) for _ in range(5)))
        await cache.get_or_make("k", make)
        return make.made

    assert run(work) == 2


class Store:
    """A store in memory; ``down`` makes it fail."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.down = False

    async def get(self, key: str) -> bytes | None:
        if self.down:
            raise StoreUnavailableError("down")
        return self.texts[key].encode() if key in self.texts else None

    async def set(self, key: str, text: str) -> None:
        if self.down:
            raise StoreUnavailableError("down")
        self.texts[key] = text


def test_replicas_share_a_store_and_do_without_one_that_is_down_or_broken() -> None:
    async def work() -> None:
        store: Any = Store()
        make = Maker()
        make.gate.set()
        assert (await CritiqueCache(8, store).get_or_make("k", make))[1] is Source.MISS
        other = CritiqueCache(8, store)
        assert await other.get_or_make("k", make) == Found(ANSWER, Source.SHARED)
        assert (await other.get_or_make("k", make))[1] is Source.HIT and make.made == 1
        store.texts["another"] = store.texts["k"]
        third = CritiqueCache(8, store)
        errors: list[int] = []
        third.on_store_error = lambda: errors.append(1)
        assert (await third.get_or_make("another", make))[1] is Source.MISS and len(errors) == 1
        store.texts["k"] = '{"id": 1}'
        with capture_logs() as logged:
            assert (await third.get_or_make("k", make))[1] is Source.MISS and len(errors) == 2
        assert "key: Field required" in logged[0]["error"] and "://" not in logged[0]["error"]
        store.down = True
        assert (await third.get_or_make("other", make))[1] is Source.MISS and len(errors) == 4

    run(work)


class Critic(GatedBackend):
    """Serves with other weights, prompts or texts as the test wants."""

    weights = "w"

    def identity(self, prompt_version: str) -> CriticIdentity:
        return super().identity(prompt_version).model_copy(update={"weights_revision": self.weights})


def key_of(
    request: CritiqueRequest = REQUEST,
    weights: str = "w",
    prompts: str = "chat-v1",
    decoding: dict[str, Any] | None = None,
) -> str:
    backend = Critic()
    backend.weights = weights
    return CritiqueCache(1, decoding=decoding).key_of(request, CriticService(backend, prompts).shaping())


def key_with_another_wording(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    def load(version: str, wanted: str) -> Prompt:
        prompt = load_prompt(version, wanted)
        role, body = prompt.messages[0]
        return replace(prompt, messages=((role, f"{body} Please."), *prompt.messages[1:])) if wanted == name else prompt

    monkeypatch.setattr("stepalign_critic.service.load_prompt", load)
    return key_of()


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    "question": lambda _: key_of(REQUEST.model_copy(update={"question": "r"})),
    "mode": lambda _: key_of(REQUEST.model_copy(update={"mode": CritiqueMode.OMISSION})),
    "no answer": lambda _: key_of(REQUEST.model_copy(update={"answer": None})),
    "weights": lambda _: key_of(weights="v"),
    "prompt set": lambda _: key_of(prompts="lab-v1"),
    "prompt": lambda patch: key_with_another_wording(patch, "critique"),
    "stricter prompt": lambda patch: key_with_another_wording(patch, "critique_retry"),
    "budget": lambda _: key_of(decoding={"max_new_tokens": 5}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_shapes_an_answer_is_part_of_its_key(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = key_of()
    assert key_of(REQUEST.model_copy()) == usual
    assert CHANGES[change](monkeypatch) != usual


def test_arguments_of_the_engine_shape_answers() -> None:
    usual = CriticServerSection(backend="vllm", path=Path("m"))
    quantized = usual.model_copy(update={"vllm": VllmSection(engine_args={"quantization": "fp8"})})
    assert usual.shaping() != quantized.shaping()


@pytest.mark.parametrize(
    "shaping", [{"extra_body": {"top_k": 1}}, {"omit": ["temperature"]}, {"max_tokens_field": "max_completion_tokens"}]
)
def test_fields_of_requests_to_a_server_shape_answers(shaping: dict[str, Any]) -> None:
    usual = CriticServerSection(backend="openai", openai=OpenAISection(base_url="http://m/v1"))
    changed = usual.model_copy(update={"openai": usual.openai.model_copy(update=shaping)})
    assert usual.shaping() != changed.shaping()


def test_callers_with_other_api_keys_share_nothing() -> None:
    async def of(key: str) -> str:
        set_key(key)
        return key_of(REQUEST)

    keys = [asyncio.run(of(key)) for key in ("one", "two", "one")]
    assert keys[0] == keys[2] != keys[1] and key_of(REQUEST) not in keys
