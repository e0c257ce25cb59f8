"""Rows of a data set in the Hugging Face hub, through ``datasets`` (extra ``hub``), imported once it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from stepalign.commands.extras import how_to_install
from stepalign.errors import ConfigError
from stepalign.problems.readers import Row


def hub_rows(name: str, split: str | None) -> Iterator[Row]:
    """The rows of a split; without a name of one those of the only split.

    ``name`` is ``owner/name``, or a folder that ``datasets`` can load. Raises ConfigError with what to change where
    there is no such data set, or where it has several splits and none is named.
    """
    try:
        import datasets  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        said = f"{name}: there is no such file, and reading the hub needs datasets: {how_to_install('hub')}"
        raise ConfigError(said) from None
    library = cast(Any, datasets)
    try:
        found = library.load_dataset(name)
    # The library raises errors of many kinds for what its user got wrong: names, splits, networks.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{name}: neither a file nor a data set that the hub gives ({reason})") from None
    splits: list[str] = list(found)
    if split is None and len(splits) > 1:
        raise ConfigError(f"{name} has the splits {', '.join(splits)}; choose one with --split")
    chosen = split if split is not None else splits[0]
    if chosen not in splits:
        raise ConfigError(f"{name} has no split {chosen!r}; it has {', '.join(splits)}")
    for number, value in enumerate(found[chosen], start=1):
        yield Row(number, value)
