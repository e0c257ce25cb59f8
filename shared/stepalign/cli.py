"""The ``stepalign`` command: its errors and exit codes. :mod:`stepalign.commands.application` holds the subcommands.

The command is an extra (``cli``), and the client alone installs it too. So nothing here imports Typer before ``main``
can say how to install it.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

from stepalign.commands.extras import extra_for, how_to_install
from stepalign.commands.printable import printable
from stepalign.errors import StepalignError


def _end(signal_number: int, _frame: FrameType | None) -> None:
    os._exit(128 + signal_number)


def _refusal(error: Exception, command: str | None) -> str | None:
    """The line for the user; None for an error that nobody expected."""
    if isinstance(error, StepalignError):
        return str(error)
    if isinstance(error, PermissionError):
        return f"{error.filename}: user {os.getuid()} may not read or write this"
    if isinstance(error, ModuleNotFoundError) and (extra := extra_for(error.name, command)) is not None:
        return f"the module {error.name!r} is missing: {how_to_install(extra)}"
    return None


def _run_application(command: str | None) -> None:
    from stepalign.commands.application import build_app

    build_app(command)()


def main() -> None:
    """Entry point. An error of ours is one line on stderr and its own exit code; any other a traceback and 70.

    A supervisor tells from the code whether to start the process again.
    """
    if os.getpid() == 1:
        # The first process of a container has no default action: without a handler SIGTERM would be ignored.
        signal.signal(signal.SIGTERM, _end)
    command = next(iter(sys.argv[1:]), None)
    try:
        _run_application(command)
    except Exception as error:
        refusal = _refusal(error, command)
        if refusal is None:
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
            sys.exit(os.EX_SOFTWARE)
        print(f"stepalign: {printable(refusal)}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, StepalignError) else 1)


if __name__ == "__main__":
    main()
