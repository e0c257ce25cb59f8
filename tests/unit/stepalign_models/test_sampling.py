"""Sampling: reproducible per completion, distributed as the model says, cut at EOS."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from stepalign.errors import NonFiniteError
from stepalign.types import FinishReason
from stepalign_lab.tokenizer import build_tokenizer
from stepalign_models.loading import load_policy
from stepalign_models.sampling import MIN_SHARED_TOKENS, Completion, Sampler, SeededSampling, stable_seed
from stepalign_run.config import ModelSection
from stepalign_run.rollout import SamplingParameters

pytestmark = pytest.mark.numeric

SHORT = [5, 12]
LONG = [7, 3, 9, 4, 22, 11, 6, 8, 2, 5, 19]
DRAWS = 3000


@pytest.fixture
def model(model_path: Path) -> Any:
    return load_policy(ModelSection(path=model_path, device="cpu"), None, merge=True)


@pytest.fixture
def sampler(model: Any, tokenizer: Any) -> Sampler:
    return Sampler(model, tokenizer)


def parameters(seed: int, **settings: Any) -> SamplingParameters:
    return SamplingParameters.model_validate({"temperature": 1.1, "max_new_tokens": 40, "seed": seed} | settings)


def log_probabilities(model: Any, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """``[T, V]`` at the completion's positions, from one forward pass without cache or padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


def first_tokens(sampler: Sampler, **settings: Any) -> Counter[int]:
    draws = [parameters(seed, max_new_tokens=1, **settings) for seed in range(DRAWS)]
    return Counter(c.token_ids[0] for c in sampler.sample([SHORT] * DRAWS, draws))


def chi_square(found: Counter[int], probabilities: torch.Tensor) -> float:
    expected = (DRAWS * probabilities).tolist()
    return sum((found[token] - e) ** 2 / e for token, e in enumerate(expected) if e > 0)


def next_token(model: Any, temperature: float) -> torch.Tensor:
    return log_probabilities(model, SHORT, [0], temperature)[0].exp()


def by_seed(completions: list[Completion], seeds: list[int]) -> dict[int, list[int]]:
    return {seed: completion.token_ids for seed, completion in zip(seeds, completions, strict=True)}


def test_a_completion_depends_on_its_seed_and_prompt_not_on_its_batch(sampler: Sampler) -> None:
    seeds = list(range(6))
    alone = {seed: sampler.sample([SHORT], [parameters(seed)])[0].token_ids for seed in seeds}
    together = by_seed(sampler.sample([SHORT] * 6, [parameters(s) for s in seeds]), seeds)
    # Padded on the left to the length of the longer prompts, in another order, beside strangers.
    mixed = sampler.sample(
        [prompt for _ in seeds for prompt in (LONG, SHORT)],
        [parameters(seed) for s in reversed(seeds) for seed in (100 + s, s)],
    )
    assert together == alone
    assert by_seed(mixed[1::2], list(reversed(seeds))) == alone


def test_a_shared_beginning_is_computed_once_and_changes_nothing(sampler: Sampler, model: Any) -> None:
    beginning = (LONG * 4)[:MIN_SHARED_TOKENS]
    prompts = [beginning + SHORT, beginning + LONG, beginning + LONG[:1], beginning + SHORT]
    alone = [sampler.sample([prompt], [parameters(seed)])[0] for seed, prompt in enumerate(prompts)]
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[-1]), with_kwargs=True
    )
    together = sampler.sample(prompts, [parameters(seed) for seed in range(len(prompts))])
    hook.remove()
    assert widths[:2] == [len(beginning), len(LONG)] and set(widths[2:]) == {1}
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_equal_and_nested_prompts_share_all_that_leaves_each_a_token(sampler: Sampler) -> None:
    beginning = (LONG * 4)[:MIN_SHARED_TOKENS]
    prompts = [[*beginning, 5], [*beginning, 5], [*beginning, 5, 12]]
    alone = [sampler.sample([prompt], [parameters(seed)])[0].token_ids for seed, prompt in enumerate(prompts)]
    together = sampler.sample(prompts, [parameters(seed) for seed in range(len(prompts))])
    assert [c.token_ids for c in together] == alone


WINDOW = 24
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
}
SLIDING = {
    "every layer": lambda size: MistralForCausalLM(MistralConfig(vocab_size=size, **SMALL)),
    "some layers": lambda size: Gemma3ForCausalLM(
        Gemma3TextConfig(vocab_size=size, layer_types=["sliding_attention", "full_attention"], **SMALL)
    ),
}


@pytest.mark.parametrize("layers", SLIDING)
def test_a_sliding_window_sees_the_same_tokens_in_a_batch(layers: str, tokenizer: Any) -> None:
    """Padding between a shared beginning and the rest would push tokens out of the window."""
    torch.manual_seed(0)
    model = SLIDING[layers](len(tokenizer)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # Random weights as they are hardly tell one context from another.
                weight.mul_(6)
    sampler = Sampler(model, tokenizer)
    beginning = (LONG * 4)[: MIN_SHARED_TOKENS + 8]
    prompts = [beginning + SHORT, beginning + LONG * 3]
    alone = [sampler.sample([prompt], [parameters(seed)])[0] for seed, prompt in enumerate(prompts)]
    together = sampler.sample(prompts, [parameters(seed) for seed in range(len(prompts))])
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_other_seeds_give_other_completions(sampler: Sampler) -> None:
    completions = sampler.sample([SHORT] * 20, [parameters(seed) for seed in range(20)])
    # Two may both end at once by chance, hardly more.
    assert len({tuple(c.token_ids) for c in completions}) >= 18


def test_stable_seeds_differ_by_any_part_and_do_not_run_together() -> None:
    seeds = {stable_seed(0, "p", 1, 2), stable_seed(1, "p", 1, 2), stable_seed(0, "p", 12), stable_seed(0, "p1", 2)}
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert stable_seed(0, "p", 1, 2) == stable_seed(0, "p", 1, 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_distribution_at_the_temperature(
    sampler: Sampler, model: Any, temperature: float
) -> None:
    found = first_tokens(sampler, temperature=temperature)
    # 51 degrees of freedom: the 99.9th percentile is 87.97.
    assert chi_square(found, next_token(model, temperature)) < 87.97
    assert chi_square(found, next_token(model, temperature * 2)) > 100


def test_top_k_keeps_the_k_most_likely_and_renormalises(sampler: Sampler, model: Any) -> None:
    probabilities = next_token(model, 1.1)
    kept = probabilities.topk(5).indices
    expected = torch.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    found = first_tokens(sampler, top_k=5)
    assert set(found) == set(kept.tolist())
    assert chi_square(found, expected) < 18.47  # 4 degrees of freedom, 99.9th percentile


def test_top_p_keeps_the_smallest_set_that_reaches_p(sampler: Sampler, model: Any) -> None:
    probabilities = next_token(model, 1.1)
    order = probabilities.sort(descending=True).indices.tolist()
    kept: list[int] = []
    while sum(probabilities[token].item() for token in kept) < 0.5:
        kept.append(order[len(kept)])
    expected = torch.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    found = first_tokens(sampler, top_p=0.5)
    assert 2 < len(kept) < 30 and set(found) == set(kept)
    assert chi_square(found, expected) < 2.5 * len(kept) + 15


def test_eos_ends_a_stopped_sample_and_is_absent_from_a_cut_one(sampler: Sampler, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    completions = sampler.sample([SHORT] * 40, [parameters(seed) for seed in range(40)])
    stopped = [c for c in completions if c.finish_reason is FinishReason.STOP]
    cut = [c for c in completions if c.finish_reason is FinishReason.LENGTH]
    assert stopped and cut
    for completion in stopped:
        assert completion.token_ids.index(eos) == len(completion.token_ids) - 1
        assert completion.text == tokenizer.decode(completion.token_ids[:-1])
    for completion in cut:
        assert len(completion.token_ids) == 40 and eos not in completion.token_ids
        assert completion.text == tokenizer.decode(completion.token_ids)
    assert all(len(c.logprobs) == len(c.token_ids) for c in completions)


def test_eos_as_the_last_token_of_the_budget_counts_as_stopped(sampler: Sampler, tokenizer: Any) -> None:
    seeds = range(40)
    whole = sampler.sample([SHORT] * 40, [parameters(seed) for seed in seeds])
    pairs = zip(seeds, whole, strict=True)
    seed, stopped = next((s, c) for s, c in pairs if c.finish_reason is FinishReason.STOP and len(c.token_ids) > 5)
    length = len(stopped.token_ids)
    exact, short = (sampler.sample([SHORT], [parameters(seed, max_new_tokens=n)])[0] for n in (length, length - 1))
    assert (exact.token_ids, exact.finish_reason) == (stopped.token_ids, FinishReason.STOP)
    assert (short.token_ids, short.finish_reason) == (stopped.token_ids[:-1], FinishReason.LENGTH)


def test_log_probabilities_are_those_of_the_model_at_the_temperature(sampler: Sampler, model: Any) -> None:
    prompts = [SHORT, LONG, SHORT]
    completions = sampler.sample(prompts, [parameters(seed) for seed in (1, 2, 3)])
    for prompt, completion in zip(prompts, completions, strict=True):
        table = log_probabilities(model, prompt, completion.token_ids, 1.1)
        expected = table[range(len(table)), completion.token_ids]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_log_probabilities_are_those_after_the_filters(sampler: Sampler, model: Any) -> None:
    completion = sampler.sample([SHORT], [parameters(4, top_k=3)])[0]
    table = log_probabilities(model, SHORT, completion.token_ids, 1.1)
    kept = table.topk(3).values.exp().sum(-1).log()
    expected = table[range(len(table)), completion.token_ids] - kept
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_padding_with_eos_changes_nothing(model: Any, sampler: Sampler) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    padded_with_eos = Sampler(model, tokenizer)
    prompts, draws = [SHORT, LONG] * 10, [parameters(seed) for seed in range(20)]
    completions = padded_with_eos.sample(prompts, draws)
    assert padded_with_eos.pad_id == tokenizer.eos_token_id != sampler.pad_id
    assert completions == sampler.sample(prompts, draws)
    assert all(c.token_ids.count(tokenizer.eos_token_id) == (c.finish_reason == "stop") for c in completions)


def test_a_tokenizer_without_padding_is_padded_with_eos(model: Any, sampler: Sampler) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    prompts, draws = [SHORT, LONG], [parameters(seed) for seed in (1, 2)]
    assert Sampler(model, tokenizer).sample(prompts, draws) == sampler.sample(prompts, draws)


def test_every_end_token_of_the_model_ends_a_completion(model: Any, tokenizer: Any) -> None:
    ends = [tokenizer.eos_token_id, 7]
    model.generation_config.eos_token_id = ends
    completions = Sampler(model, tokenizer).sample([SHORT] * 40, [parameters(seed) for seed in range(40)])
    last = Counter(c.token_ids[-1] for c in completions if c.finish_reason is FinishReason.STOP)
    assert set(last) == set(ends)
    assert all(token not in ends for c in completions for token in c.token_ids[:-1])


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [1, 2, 3]}]
)
def test_generation_defaults_of_the_model_do_not_reach_the_distribution(
    model: Any, tokenizer: Any, sampler: Sampler, setting: dict[str, Any]
) -> None:
    draws = [parameters(seed) for seed in range(4)]
    expected = sampler.sample([LONG] * 4, draws)
    model.generation_config.update(**setting)
    assert Sampler(model, tokenizer).sample([LONG] * 4, draws) == expected
    # The model is not changed by it.
    assert model.generation_config.to_dict().items() >= setting.items()


def test_the_model_has_its_generation_configuration_back_after_a_failure(model: Any, tokenizer: Any) -> None:
    own = model.generation_config
    sampler = Sampler(model, tokenizer)
    with pytest.raises(NonFiniteError), torch.no_grad():
        model.model.norm.weight[0] = torch.nan
        sampler.sample([SHORT], [parameters(0)])
    assert model.generation_config is own


def test_each_token_takes_the_next_random_number() -> None:
    uniforms = torch.tensor([[0.1, 0.9, 0.6], [0.7, 0.2, 0.3]], dtype=torch.float64)
    choice = SeededSampling(parameters(0, temperature=1.0), uniforms)
    even, never = torch.zeros(2, 2), torch.tensor([[-torch.inf, 0.0]] * 2)
    tokens = [choice(torch.empty(2, 0), scores).argmax(-1).tolist() for scores in (even, even, never)]
    assert tokens == [[0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("other", [{"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.9}, {"max_new_tokens": 3}])
def test_mixed_parameters_are_refused(sampler: Sampler, other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="equal but for the seed"):
        sampler.sample([SHORT, SHORT], [parameters(1), parameters(2, **other)])


def test_a_prompt_without_parameters_is_refused(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="per prompt"):
        sampler.sample([SHORT, SHORT], [parameters(1)])


def test_a_policy_that_is_not_finite_is_refused_and_not_sampled(model: Any, tokenizer: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="probabilities are not finite"):
        Sampler(broken, tokenizer).sample([[1, 2]], [parameters(0)])
