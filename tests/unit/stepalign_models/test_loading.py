"""Loading the policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepalign.errors import ConfigError
from stepalign_models.loading import load_policy, load_tokenizer
from stepalign_run.config import ModelSection
from support.numeric import assert_close_to_norm

pytestmark = pytest.mark.numeric

INPUT = torch.tensor([[5, 12, 7, 30, 31, 2]])


@torch.no_grad()
def logits(path: Path, adapter: Path | None, *, merge: bool) -> torch.Tensor:
    model = load_policy(ModelSection(path=path, device="cpu"), adapter, merge=merge)
    assert not model.training
    return model(input_ids=INPUT).logits


def test_merged_and_unmerged_adapter_are_the_same_policy(
    tmp_path: Path, model_path: Path, save_adapter: Callable[..., Path]
) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    merged, beside = logits(model_path, adapter, merge=True), logits(model_path, adapter, merge=False)
    assert_close_to_norm([merged], [beside], 1e-5)
    assert (merged - logits(model_path, None, merge=True)).abs().max() > 0.1


def test_each_load_starts_from_the_base(tmp_path: Path, model_path: Path, save_adapter: Callable[..., Path]) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    before = logits(model_path, None, merge=True)
    first, second = logits(model_path, adapter, merge=True), logits(model_path, adapter, merge=True)
    assert torch.equal(first, second)
    assert torch.equal(before, logits(model_path, None, merge=True))


def test_a_folder_without_a_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no model there"):
        load_policy(ModelSection(path=tmp_path / "nowhere", device="cpu"), None, merge=True)
    with pytest.raises(ConfigError, match=r"there is no model there"):
        load_tokenizer(tmp_path / "nowhere")
