"""What ``critic.vllm.engine_args`` may say, held against the arguments that this vLLM has."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from stepalign.errors import ConfigError
from stepalign_run.config import load_critic_config
from support.stacks import REPO

NAMES = {field.name for field in fields(AsyncEngineArgs)}
# They speculate, load other files than the folder's, or run code that is named.
DECISIVE = re.compile(
    r"^spec_|^speculative|^model_(weights|class)|tokenizer|plugin|_cls$|remote_code|transfer_config|^hf_"
)
HARMLESS = {"hf_token"}


@pytest.mark.parametrize("name", sorted(name for name in NAMES - HARMLESS if DECISIVE.search(name)))
def test_an_argument_that_would_make_another_critic_is_refused(name: str) -> None:
    options = ["--critic.backend", "vllm", "--critic.path", "model", "--critic.vllm.engine_args", f"{name}='x'"]
    with pytest.raises(ConfigError, match=rf"\b{name}: "):
        load_critic_config(REPO / "configs" / "critic.toml", options, {})
