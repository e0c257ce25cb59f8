"""The list of models of a server with OpenAI's protocol, and the choice of one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepalign.errors import ConfigError
from stepalign_critic.backends.openai_answers import read_json, whole


@dataclass(frozen=True)
class ModelList:
    """The names of the served models. Without ``whole`` there may be more: the list has pages or patterns."""

    names: list[str]
    whole: bool

    def serves(self, wanted: str) -> bool:
        """Whether the server takes this name, as far as the list tells.

        Some servers know a model by more names than they list: with ``:latest`` behind it or without, or with a variant
        such as ``:free``. Some load what is asked for, and list nothing before.
        """
        spelled = {wanted, f"{wanted}:latest", wanted.partition(":")[0]}
        return not self.whole or not self.names or bool(spelled & set(self.names))


def read_models(content: bytes) -> ModelList | None:
    """The list in an answer's body, in the shapes that servers give it; None where there is none."""
    try:
        body = read_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None
    listed = body
    if isinstance(body, dict):
        listed = next((body[key] for key in ("data", "models") if isinstance(body.get(key), list)), None)
    if not isinstance(listed, list):
        return None
    names = [name for entry in listed if (name := _name(entry)) is not None]
    more = isinstance(body, dict) and any(body.get(key) for key in ("has_more", "next", "next_page", "next_page_token"))
    return ModelList(names, whole=not more and not any("*" in name for name in names))


def _name(entry: Any) -> str | None:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in ("id", "name", "model") if isinstance(entry.get(key), str)), None)
    return whole(entry) if isinstance(entry, str) and entry else None


def choose_model(wanted: str | None, listed: ModelList) -> str:
    """The model to ask for. Raises ConfigError when it is not served, and when none is wanted and one is not all."""
    if wanted is None and listed.whole and len(listed.names) == 1:
        return listed.names[0]
    if wanted is not None and listed.serves(wanted):
        return wanted
    served = ", ".join(listed.names[:20]) or "no model"
    more = ", and more" if len(listed.names) > 20 or not listed.whole else ""
    raise ConfigError(f"critic.openai.model is {wanted!r}; the model's server serves {served}{more}")
