"""Rows of a Parquet file. ``pyarrow`` comes with the extra ``data`` and is imported once such a file is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from stepalign.commands.extras import how_to_install
from stepalign.problems.readers import Row

_ROWS_AT_ONCE = 256


def parquet_rows(path: Path) -> Iterator[Row]:
    """Raises ValueError where the file cannot be read, or where ``pyarrow`` is not installed."""
    try:
        import pyarrow  # pyright: ignore[reportMissingTypeStubs]
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ValueError(f"a Parquet file, which needs pyarrow: {how_to_install('data')}") from None
    # It has no types.
    arrow, reader = cast(Any, pyarrow), cast(Any, parquet)
    try:
        with reader.ParquetFile(path) as file:
            names: list[str] = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"a column is there twice: {', '.join(sorted(names))}; rename one")
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, value)
    except (arrow.ArrowException, OSError, ArithmeticError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the Parquet file cannot be read ({reason}); write it again") from None
