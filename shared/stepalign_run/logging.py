"""Logs of the processes: JSON on stderr, one object a line, with the ids that tie processes together (run, rollout,
request).

Bind ids with ``structlog.contextvars.bound_contextvars(run_id=…, rollout_id=…, request_id=…)``; every line written
inside carries them, also from libraries that log through the standard library.

The command that starts them logs for a reader instead: :func:`configure_console_logging`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import TextIO, cast

import structlog

from stepalign.commands.printable import printable


class _Stderr:
    """Standard error, looked up for every line, because a capturing program may have replaced it.

    A line that cannot be written fails nothing. Once nobody reads any more (a closed pipe), the lines go nowhere, as
    they do where there is no standard error.
    """

    def write(self, text: str) -> int:
        self._try(lambda stderr: stderr.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stderr: stderr.flush())

    @staticmethod
    def _try(act: Callable[[TextIO], object]) -> None:
        stderr = cast(TextIO | None, sys.stderr)
        try:
            if stderr is not None:
                act(stderr)
        except BrokenPipeError:
            # Else the process would try once more at its end to write the buffered text.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stderr.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            # A full disk, or a file that is closed.
            pass


_STDERR = cast(TextIO, _Stderr())


class _Logger(structlog.WriteLogger):
    """Writes to standard error; has a name, as ``add_logger_name`` wants it."""

    def __init__(self, name: str) -> None:
        super().__init__(_STDERR)
        self.name = name


@cache
def _encoder(default: Callable[[object], object]) -> json.JSONEncoder:
    """``json.dumps`` makes one for every line."""
    return json.JSONEncoder(default=default)


def _written(event: object, default: Callable[[object], object]) -> str:
    return _encoder(default).encode(event)


_JSON = structlog.processors.JSONRenderer(serializer=_written)


def configure_logging(process: str, level: int = logging.INFO) -> None:
    """Send structlog and standard-library records to stderr as JSON. ``process`` names this process in each line."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    # Not through the standard library: it would make, copy and format a record only to hold a finished line.
    structlog.configure(
        processors=[*shared, _JSON],
        logger_factory=_Logger,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(_STDERR)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _JSON,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(process=process)


def configure_console_logging() -> None:
    """Write structlog's records to stderr as lines to read, which no value in them can keep from being read."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            _printable_values,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        # A program may read the command's stdout.
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _printable_values(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Of texts. Anything else is shown as its ``repr``, which escapes them."""
    return {key: printable(value) if isinstance(value, str) else value for key, value in event.items()}


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    return structlog.get_logger(name)
