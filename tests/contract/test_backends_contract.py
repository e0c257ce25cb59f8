"""The same contract on every critic backend, and what only a language model has to keep.

``vllm`` takes part where it is installed, which is where ``make test-vllm`` runs this.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import structlog

from stepalign.errors import ConfigError, PromptTooLongError
from stepalign.types import CritiqueRequest, FinishReason
from stepalign_critic.backends import create_backend
from stepalign_critic.backends.base import Backend, Generation, RenderedPrompt
from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.backends.transformers import TransformersBackend
from stepalign_critic.errors import NotReadyError, SaturatedError
from stepalign_critic.service import CriticService
from stepalign_lab.tokenizer import CONTROL, build_tokenizer
from stepalign_run.config import CriticServerSection
from support.openai_server import OpenAIServer, running

STEP = "<step_1> 3 + 4 = 7 </step_1>"
REQUESTS = [
    CritiqueRequest(question="3 + 4 * 7", attempt=f"{STEP} <step_2> 7 * 7 = 9 </step_2> <answer> 9 </answer>"),
    CritiqueRequest(question="9 * 9", attempt=""),
    CritiqueRequest(question="3 + 4 - 8 * 2 + 6", attempt=STEP, reference_solution="7 is 4 + of 3 ; so 7"),
    CritiqueRequest(question="5 - 8", attempt="<step_1> 5 - 8 = 7 </step_1> <answer> 7 </answer>"),
    CritiqueRequest(question="3 + 4 * 7", attempt=f"{STEP} <step_2> 7 * 7 = 1 </step_2>"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama. Its weights are large, so that its greedy answers depend on the prompt.

    vLLM takes no smaller heads than these of 32 on a CPU.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("critic")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Kind:
    """A kind of backend and the configuration that makes one."""

    name: str
    options: dict[str, Any]

    def section(self, **options: Any) -> CriticServerSection:
        return CriticServerSection(prompts="lab-v1", **{**self.options, **options})


# The folder of our own tests of that name is no package and has no origin.
VLLM = find_spec("vllm")
LANGUAGE_MODELS = ["transformers", *(["vllm"] if VLLM is not None and VLLM.origin is not None else [])]
EAGER = {"gpu_memory_utilization": 0.1, "engine_args": {"enforce_eager": True}}


def language_model_of(name: str, folder: Path) -> Kind:
    options = {"backend": name, "path": folder, "device": "cpu", "max_new_tokens": 12, "max_prompt_tokens": 100}
    return Kind(name, options | ({"vllm": EAGER} if name == "vllm" else {}))


@pytest.fixture(params=LANGUAGE_MODELS)
def language_model(request: pytest.FixtureRequest, model_folder: Path) -> Kind:
    return language_model_of(request.param, model_folder)


@pytest.fixture
def transformers_model(model_folder: Path) -> Kind:
    return language_model_of("transformers", model_folder)


@pytest.fixture(scope="module")
def served(model_folder: Path) -> Iterator[str]:
    """The language model behind an OpenAI-compatible server; its address."""
    section = CriticServerSection(path=model_folder, device="cpu", max_new_tokens=12, max_prompt_tokens=100)
    with running(OpenAIServer(create_backend(section)).app) as url:
        yield f"{url}/v1"


@pytest.fixture(params=["program", "openai", *LANGUAGE_MODELS])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "program":
        return Kind("program", {"backend": "program", "checker": "lab"})
    if request.param == "openai":
        address = request.getfixturevalue("served")
        return Kind("openai", {"backend": "openai", "openai": {"base_url": address}, "max_new_tokens": 12})
    return language_model_of(request.param, request.getfixturevalue("model_folder"))


class Engines:
    """The three backends of vLLM that were used last: an engine takes half a minute to start. They live on one loop."""

    def __init__(self) -> None:
        self._backends: dict[str, Backend] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, section: CriticServerSection, act: Callable[[Backend], Awaitable[Any]]) -> Any:
        return asyncio.run_coroutine_threadsafe(self._run(section, act), self._loop).result()

    async def _run(self, section: CriticServerSection, act: Callable[[Backend], Awaitable[Any]]) -> Any:
        # vLLM batches by itself.
        key = section.model_dump_json(exclude={"batch_wait_ms"})
        backend = self._backends.pop(key, None)
        if backend is None:
            while len(self._backends) > 2:
                await self._backends.pop(next(iter(self._backends))).stop()
            backend = create_backend(section)
            await backend.start()
        try:
            return await act(backend)
        finally:
            if backend.healthy():
                self._backends[key] = backend
            else:
                await backend.stop()

    async def _stop(self) -> None:
        for backend in self._backends.values():
            await backend.stop()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture(scope="module", autouse=True)
def engines() -> Iterator[Engines]:
    ENGINES.append(Engines())
    yield ENGINES[0]
    ENGINES.pop().close()


ENGINES: list[Engines] = []


def started(section: CriticServerSection, act: Callable[[Backend], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        backend = create_backend(section)
        await backend.start()
        try:
            return await act(backend)
        finally:
            await backend.stop()

    return ENGINES[0].run(section, act) if section.backend == "vllm" else asyncio.run(main())


def render(backend: Backend, request: CritiqueRequest) -> RenderedPrompt:
    messages = CriticService(backend, "lab-v1").messages(request)
    return RenderedPrompt(request, messages, backend.render(messages))


async def together(backend: Backend, requests: Sequence[CritiqueRequest]) -> list[Generation]:
    return await asyncio.gather(*(backend.generate(render(backend, request)) for request in requests))


async def one_by_one(backend: Backend, requests: Sequence[CritiqueRequest]) -> list[Generation]:
    return [await backend.generate(render(backend, request)) for request in requests]


def test_the_same_prompt_gets_the_same_answer(kind: Kind) -> None:
    first = started(kind.section(batch_wait_ms=0), lambda backend: one_by_one(backend, [REQUESTS[0]] * 2))
    again = started(kind.section(batch_wait_ms=0), lambda backend: one_by_one(backend, [REQUESTS[0]]))
    assert first == again * 2
    assert first[0].text


def test_the_answer_does_not_depend_on_what_is_generated_with_it(kind: Kind) -> None:
    alone = started(kind.section(batch_wait_ms=0), lambda backend: one_by_one(backend, REQUESTS))
    batched = started(
        kind.section(batch_wait_ms=1000, max_batch=len(REQUESTS)), lambda backend: together(backend, REQUESTS)
    )
    assert batched == alone
    assert len({generation.text for generation in alone}) >= 3


def test_the_identity_is_stable_and_names_what_made_the_critique(kind: Kind) -> None:
    async def identity(backend: Backend) -> Any:
        before = backend.identity("lab-v1")
        await backend.generate(render(backend, REQUESTS[0]))
        assert backend.identity("lab-v1") == before
        return before

    first, second = (started(kind.section(), identity) for _ in range(2))
    assert first == second
    assert (first.backend, first.prompt_version) == (kind.name, "lab-v1")
    assert first.model and first.weights_revision


def test_a_started_backend_is_healthy_and_may_be_stopped_twice(kind: Kind) -> None:
    async def act(backend: Backend) -> None:
        assert backend.healthy()
        await backend.stop()
        await backend.stop()

    started(kind.section(), act)


def test_the_expected_wait_is_measured_and_grows_with_what_waits(kind: Kind) -> None:
    async def act(backend: Backend) -> tuple[float | None, float | None, float | None, float | None]:
        before = backend.expected_wait_seconds()
        await backend.generate(render(backend, REQUESTS[0]))
        idle = backend.expected_wait_seconds()
        busy: list[float | None] = []
        prompt = render(backend, REQUESTS[0])
        answers: list[asyncio.Task[Generation]] = []
        for _ in range(2):
            answers += [asyncio.create_task(backend.generate(prompt)) for _ in range(2)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            busy.append(backend.expected_wait_seconds())
        await asyncio.gather(*answers)
        return before, idle, *busy

    before, idle, some, more = started(kind.section(max_batch=1, batch_wait_ms=0), act)
    assert (before, idle) == (None, 0.0)
    assert some is not None and more is not None and 0 < some < more


def test_a_cancelled_generation_makes_room_for_the_next(kind: Kind) -> None:
    async def act(backend: Backend) -> Generation:
        prompt = render(backend, REQUESTS[0])
        dropped = [asyncio.create_task(backend.generate(prompt)) for _ in range(2)]
        await asyncio.sleep(0.02)
        for task in dropped:
            task.cancel()
        assert await asyncio.gather(*dropped, return_exceptions=True)
        return await backend.generate(prompt)

    section = kind.section(max_batch=1, max_queue=1, batch_wait_ms=0)
    assert started(section, act) == started(section, lambda backend: one_by_one(backend, REQUESTS[:1]))[0]


def test_a_backend_that_was_not_started_may_be_stopped(kind: Kind) -> None:
    asyncio.run(create_backend(kind.section()).stop())


def test_an_unknown_checker_is_refused_and_the_installed_ones_named() -> None:
    with pytest.raises(ConfigError, match=r"'nobody'.*installed are .*'lab'"):
        create_backend(CriticServerSection(backend="program", checker="nobody"))


def test_a_checker_logs_with_its_requests_id_and_refuses_once_stopped() -> None:
    seen: list[dict[str, Any]] = []

    def checker(question: str, attempt: str) -> str:
        seen.append(structlog.contextvars.get_contextvars())
        return attempt

    async def main() -> None:
        backend = ProgramBackend("logs", checker, "r", max_running=1, max_waiting=1)
        with structlog.contextvars.bound_contextvars(request_id="req_1"):
            await backend.generate(render(backend, REQUESTS[0]))
        await backend.stop()
        for _ in range(3):
            with pytest.raises(NotReadyError, match="takes no more requests"):
                await backend.generate(render(backend, REQUESTS[0]))

    asyncio.run(main())
    assert [each.get("request_id") for each in seen] == ["req_1"]


def test_a_sequence_ends_when_nobody_waits_for_it_and_the_others_go_on(transformers_model: Kind) -> None:
    """Of two that are generated together; the model is slow, and what it writes is seen row by row."""
    section = transformers_model.section(max_new_tokens=150, max_batch=2, batch_wait_ms=50)
    forwards: list[int] = []
    written: list[list[list[int]]] = []

    async def act(backend: Backend) -> Generation:
        assert isinstance(backend, TransformersBackend)
        model = backend._ready.model
        generate = model.generate

        def slowly(*_: Any) -> None:
            forwards.append(1)
            time.sleep(0.01)

        def watched(**options: Any) -> Any:
            output = generate(**options)
            written.append(output[:, options["input_ids"].shape[1] :].tolist())
            return output

        model.register_forward_hook(slowly)
        model.generate = watched
        first, second = (asyncio.create_task(backend.generate(render(backend, REQUESTS[i]))) for i in range(2))
        while len(forwards) < 5:
            await asyncio.sleep(0.001)
        first.cancel()
        return await second

    second = started(section, act)
    (alone,) = started(section, lambda backend: one_by_one(backend, REQUESTS[1:2]))
    assert second == alone and second.completion_tokens == 150
    ((gone, kept),) = written
    pad = build_tokenizer().pad_token_id
    assert set(gone[-50:]) == {pad} and len(set(kept[-50:])) > 1


def test_a_batch_that_nobody_waits_for_ends(transformers_model: Kind) -> None:
    section = transformers_model.section(max_new_tokens=150, batch_wait_ms=0)
    forwards: list[int] = []

    def slowly(*_: Any) -> None:
        forwards.append(1)
        time.sleep(0.01)

    async def act(backend: Backend) -> None:
        assert isinstance(backend, TransformersBackend)
        backend._ready.model.register_forward_hook(slowly)
        task = asyncio.create_task(backend.generate(render(backend, REQUESTS[0])))
        while len(forwards) < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await backend.stop()

    started(section, act)
    assert len(forwards) < 100


def test_a_checker_keeps_its_place_to_its_end_whoever_still_waits() -> None:
    """Its thread goes on: were its place free, more threads would run than the configuration says."""
    gate, running = threading.Event(), threading.Event()

    def checker(question: str, attempt: str) -> str:
        running.set()
        assert gate.wait(10)
        return attempt

    async def main() -> None:
        backend = ProgramBackend("slow", checker, "r", max_running=1, max_waiting=1)
        prompt = render(backend, REQUESTS[0])
        first = asyncio.create_task(backend.generate(prompt))
        assert await asyncio.to_thread(running.wait, 10)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.create_task(backend.generate(prompt))
        await asyncio.sleep(0)
        with pytest.raises(SaturatedError):
            await backend.generate(prompt)
        gate.set()
        assert (await second).text
        assert backend.expected_wait_seconds() == 0.0

    asyncio.run(main())


def test_a_generation_over_its_budget_ends_by_length(language_model: Kind) -> None:
    (whole,) = started(language_model.section(), lambda backend: one_by_one(backend, REQUESTS[:1]))
    budget = whole.completion_tokens - 2
    (cut,) = started(language_model.section(max_new_tokens=budget), lambda backend: one_by_one(backend, REQUESTS[:1]))
    assert cut.finish_reason is FinishReason.LENGTH
    assert cut.completion_tokens == budget
    assert cut.text.split() == whole.text.split()[:budget]


def test_every_eos_ends_an_answer_and_no_other_setting_of_the_model_counts(
    language_model: Kind, model_folder: Path, tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    (endless,) = started(language_model.section(), lambda backend: one_by_one(backend, REQUESTS[:1]))
    words = endless.text.split()
    position = max(i for i, word in enumerate(words) if word not in words[:i])
    tokenizer = build_tokenizer()
    first, last = tokenizer.convert_tokens_to_ids([words[0], words[position]])
    folder = shutil.copytree(model_folder, tmp_path / "critic")
    ends = [tokenizer.eos_token_id, last]
    GenerationConfig(eos_token_id=ends, suppress_tokens=[first]).save_pretrained(folder)
    (ended,) = started(language_model.section(path=folder), lambda backend: one_by_one(backend, REQUESTS[:1]))
    assert ended.finish_reason is FinishReason.STOP
    assert ended.text.split() == words[:position]
    assert ended.completion_tokens == position + 1


def test_a_prompt_over_its_budget_is_refused_and_never_cut(transformers_model: Kind) -> None:
    async def act(backend: Backend) -> int:
        prompt = render(backend, REQUESTS[0])
        assert prompt.token_ids is not None
        return (await backend.generate(prompt)).prompt_tokens

    tokens = started(transformers_model.section(), act)
    assert started(transformers_model.section(max_prompt_tokens=tokens), act) == tokens
    with pytest.raises(PromptTooLongError, match=f"{tokens} tokens, over its budget of {tokens - 1}"):
        started(transformers_model.section(max_prompt_tokens=tokens - 1), act)


def test_special_tokens_spelled_in_an_attempt_become_unknown_words(language_model: Kind) -> None:
    tokenizer = build_tokenizer()
    control = set(tokenizer.convert_tokens_to_ids(list(CONTROL)))

    async def ids(backend: Backend) -> tuple[list[int], list[int]]:
        hostile = REQUESTS[3].model_copy(update={"attempt": " ".join(CONTROL), "reference_solution": "so 7"})
        harmless = hostile.model_copy(update={"attempt": ""})
        return render(backend, hostile).token_ids or [], render(backend, harmless).token_ids or []

    hostile, harmless = started(language_model.section(), ids)
    assert [i for i in hostile if i in control] == [i for i in harmless if i in control]
    assert hostile.count(tokenizer.unk_token_id) == len(CONTROL)


def test_no_more_wait_for_a_place_than_max_queue(kind: Kind) -> None:
    """The rest is refused, whatever the engine; a language model's batch takes its own from those that wait."""
    section = kind.section(max_queue=1, max_batch=1)

    async def act(backend: Backend) -> list[Any]:
        prompts = [render(backend, REQUESTS[0]) for _ in range(8)]
        return await asyncio.gather(*(backend.generate(prompt) for prompt in prompts), return_exceptions=True)

    kinds = Counter(type(answer) for answer in started(section, act))
    assert kinds.keys() == {Generation, SaturatedError} and kinds[SaturatedError] >= 6


def test_requests_over_max_queue_are_refused(transformers_model: Kind) -> None:
    section = transformers_model.section(max_queue=2, max_batch=8, batch_wait_ms=200)

    async def act(backend: Backend) -> list[Any]:
        prompts = [render(backend, request) for request in REQUESTS[:3]]
        return await asyncio.gather(*(backend.generate(prompt) for prompt in prompts), return_exceptions=True)

    answers = started(section, act)
    assert [type(answer) for answer in answers] == [Generation, Generation, SaturatedError]


def test_a_model_that_is_not_loaded_has_no_identity(language_model: Kind) -> None:
    with pytest.raises(NotReadyError, match="loading"):
        create_backend(language_model.section()).identity("lab-v1")


def test_the_revision_follows_the_weights(transformers_model: Kind, model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_folder, tmp_path / "critic")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    async def revision(backend: Backend) -> str:
        return backend.identity("lab-v1").weights_revision

    original = started(transformers_model.section(), revision)
    assert len(original) == 16 and int(original, 16) >= 0
    changed = started(transformers_model.section(path=folder), revision)
    assert changed != original

    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert started(transformers_model.section(path=folder), revision) not in (original, changed)


def test_a_folder_without_safetensors_is_refused(language_model: Kind, model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "critic", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="safetensors"):
        asyncio.run(create_backend(language_model.section(path=folder)).start())
    with pytest.raises(ConfigError, match=r"critic\.path is .*nowhere; there is no such folder"):
        asyncio.run(create_backend(language_model.section(path=tmp_path / "nowhere")).start())


def test_budgets_over_the_models_positions_are_refused(transformers_model: Kind) -> None:
    with pytest.raises(ConfigError, match="is 257; the model has 256 positions"):
        asyncio.run(create_backend(transformers_model.section(max_prompt_tokens=245)).start())
