"""Which device a name means, and what is refused where it is not there."""

from __future__ import annotations

import pytest

from stepalign.errors import ConfigError
from stepalign_models.devices import choose_device


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(cuda: bool, mps: bool, chosen: str) -> None:
    assert choose_device("auto", cuda=cuda, mps=mps) == chosen


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "mps", "xpu"])
def test_a_named_device_is_taken_as_it_is(name: str) -> None:
    assert choose_device(name, cuda=True, mps=True, xpu=True) == name


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu"])
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{name}'; PyTorch finds no {name.partition(':')[0]} device"):
        choose_device(name, cuda=False, mps=False)
