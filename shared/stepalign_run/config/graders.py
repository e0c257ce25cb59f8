"""Which grader judges answers where a configuration names none.

``auto`` stands for a name, which takes its place while the configuration is read: reports, fingerprints and caches know
the name. A run has one judge, its critic included, unless it names two.
"""

from __future__ import annotations

from typing import Any, cast

AUTO = "auto"
DEFAULT_PROMPTS = "chat-v2"

_Values = dict[str, Any]


def grader_beside(prompts: object) -> str:
    """``math`` beside a chat set, whose models write LaTeX; ``exact`` beside all others."""
    return "math" if isinstance(prompts, str) and prompts.startswith("chat") else "exact"


def with_own_grader(critic: _Values) -> _Values:
    """The values of a critic's table, with its grader by name."""
    return _named(critic, grader_beside(critic.get("prompts", DEFAULT_PROMPTS)))


def with_run_graders(values: _Values) -> _Values:
    """The values of a run, with both graders by name: the run's by its prompts, the critic's as the run's.

    Values that are not validated yet are left for that, whatever they are.
    """
    model, data, critic = (values.get(name, {}) for name in ("model", "data", "critic"))
    if not (isinstance(model, dict) and isinstance(data, dict) and isinstance(critic, dict)):
        return values
    prompts = cast(_Values, model).get("prompts", DEFAULT_PROMPTS)
    of_run = _named(cast(_Values, data), grader_beside(prompts))
    return {**values, "data": of_run, "critic": _named(cast(_Values, critic), of_run["grader"])}


def _named(table: _Values, name: Any) -> _Values:
    return {**table, "grader": name} if table.get("grader", AUTO) == AUTO else table
