"""What keys and values a model keeps of tokens it has read, and under which name it takes them."""

from __future__ import annotations

import inspect
from typing import Any


def cache_parameter(model: Any) -> str:
    """The name under which ``model.forward`` takes its cache: transformers 5 renamed it on its way."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def attends_to_everything(config: Any) -> bool:
    """Whether each token attends to all tokens before it, in every layer.

    A sliding window counts places and not tokens: padding between two tokens pushes tokens out of it that belong there.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return all(kind == "full_attention" for kind in kinds)
    return not getattr(text, "sliding_window", None)
