"""``stepalign critique FILE``: ask a critic from the command line, and see its critique step by step.

FILE holds one request as JSON, or several as JSON Lines; ``-`` is standard input. The exit code is 0 when every
critique aligns, 2 when a critic's answer was refused, and 1 when a request got no answer or there was nothing to ask.

A person waits for this command. So it does not retry where nobody listens, as a program's client does, unless it is
told to (``--wait``), and of the client's later retries it announces the first.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
from pydantic import ValidationError
from rich.padding import Padding
from rich.text import Text

from stepalign.client import SyncCriticClient
from stepalign.commands.printable import printable, printable_json
from stepalign.commands.terminal import Terminal
from stepalign.critique.trace import Span
from stepalign.errors import ConfigError, CriticError
from stepalign.secret_files import read_secret
from stepalign.types import Critique, CritiqueRequest, CritiqueResponse, Forced, StepStatus

_STYLES = {
    StepStatus.COPIED: "green",
    StepStatus.CORRECTED: "bold yellow",
    StepStatus.INSERTED: "bold cyan",
    StepStatus.CONTINUED: "blue",
}
_UNALIGNED = 2
_CONNECT_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 0.2


def critique(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A request as JSON, or JSON Lines; - is standard input.")],
    url: Annotated[
        str, typer.Option(envvar="STEPALIGN_CRITIC__URL", help="Address of the critic or of its load balancer.")
    ] = "http://127.0.0.1:8300",
    api_key_file: Annotated[
        Path | None, typer.Option(envvar="STEPALIGN_CRITIC__API_KEY_FILE", help="A file that holds the API key.")
    ] = None,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for a critic where nobody listens yet.")] = 0.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each critique, retries included.")] = 120.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Most critiques asked for at once.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the responses as JSON Lines.")] = False,
) -> None:
    """Ask a critic for critiques and print them, each step coloured by its status."""
    requests = _read(file)
    key = read_secret("--api-key-file", api_key_file) if api_key_file is not None else None
    with SyncCriticClient(url, api_key=key, timeout=timeout) as client, _announced_retries(timeout):
        _await_listener(url, wait)
        answers = client.critique_many(requests, concurrency=concurrency)
    console = Terminal()
    for request, answer in zip(requests, answers, strict=True):
        if as_json:
            typer.echo(printable_json(_as_json(answer)))
        else:
            _show(console, request, answer)
    if any(isinstance(answer, CriticError) for answer in answers):
        raise typer.Exit(1)
    if any(isinstance(answer, CritiqueResponse) and answer.critique is None for answer in answers):
        raise typer.Exit(_UNALIGNED)


@contextmanager
def _announced_retries(timeout: float) -> Generator[None]:
    """Print why the client tries again for the first time, and how long it would; keep the other times back."""
    log, announcement = logging.getLogger("stepalign.client"), _FirstRetry(timeout)
    level = log.level
    log.addHandler(announcement)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(announcement)


class _FirstRetry(logging.Handler):
    def __init__(self, timeout: float) -> None:
        super().__init__()
        self._timeout = timeout
        self._given = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._given:
            self._given = True
            limit = f"up to {self._timeout:g} s for each critique; --timeout shortens that"
            typer.echo(printable(f"{record.getMessage()} ({limit})"), err=True)


def _await_listener(url: str, seconds: float) -> None:
    """Return once something listens at ``url``. Raises CriticError after ``seconds``."""
    address = httpx.URL(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    deadline = time.monotonic() + seconds
    announced = False
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address.host, port), timeout=max(_CONNECT_SECONDS, left)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if left <= 0:
            raise CriticError(
                f"no critic listens at {url} ({reason}): start one with `stepalign critic CONFIG`, give another "
                "address with --url, or let --wait SECONDS wait for it"
            )
        if not announced:
            announced = True
            typer.echo(f"nobody listens at {url} ({reason}); waiting for up to {seconds:g} s (--wait)", err=True)
        time.sleep(min(left, _LOOK_AGAIN_SECONDS))


def _read(file: str) -> list[CritiqueRequest]:
    """The file's requests. Raises ConfigError, which names the line, when one cannot be read."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    requests: list[CritiqueRequest] = []
    for where, part in _parts(text):
        try:
            requests.append(CritiqueRequest.model_validate_json(part))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            said = f"{file}{where}: {field + ': ' if field else ''}{message}"
            if field == "id":
                said += "; this looks like a problem file: a request has no id, and an attempt at the question"
            raise ConfigError(said) from None
    if not requests:
        raise ConfigError(f'{file}: there is no request; write one as {{"question": "…", "attempt": "…"}}')
    return requests


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """The whole text when it is one JSON value, else its lines that are not blank."""
    try:
        json.loads(text)
    except ValueError:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f", line {number}", line
    else:
        yield "", text


_SETTLED = {
    Forced.ANSWER: "the critique's answer",
    Forced.NO_ERROR: "that no step is wrong",
    Forced.ERROR: "that there is an error",
}
_CUT = {Forced.STEP_BOUND: "a step", Forced.ANSWER_BOUND: "the answer"}


def _as_json(answer: CritiqueResponse | CriticError) -> str:
    if isinstance(answer, CritiqueResponse):
        return answer.model_dump_json()
    return json.dumps({"error": {"type": type(answer).__name__, "message": str(answer)}}, ensure_ascii=False)


def _show(console: Terminal, request: CritiqueRequest, answer: CritiqueResponse | CriticError) -> None:
    console.print(Text(printable(request.question), style="bold"))
    if isinstance(answer, CriticError):
        console.print(Text(printable(f"no answer: {answer}"), style="red"))
    elif answer.critique is not None:
        _show_critique(console, request, answer.critique)
        settled = ", ".join(said for forced, said in _SETTLED.items() if forced in answer.forced)
        if settled:
            console.print(_line(None, "settled", f"by the known answer: {settled}", "dim"))
        cut = " and ".join(said for forced, said in _CUT.items() if forced in answer.forced)
        if cut:
            console.print(_line(None, "cut", f"at the most that it may take: {cut}", "dim"))
    elif answer.failure is not None:
        said = printable(f"refused as {answer.failure.reason}: {answer.failure.detail}")
        console.print(Text(said, style="red"))
        console.print(Padding(Text(printable(answer.failure.text), style="dim"), (0, 0, 0, 2)))
    console.print()


def _show_critique(console: Terminal, request: CritiqueRequest, critique: Critique) -> None:
    difference = critique.alignment.first_difference
    for step in critique.steps:
        if difference is not None and step.status is StepStatus.CORRECTED:
            console.print(_line(step.number, "was", _sent(request, difference), "red strike"))
        console.print(_line(step.number, step.status.value, step.body, _STYLES[step.status]))
    if difference is not None and critique.answer_is_wrong:
        console.print(_line(None, "was", _sent(request, difference), "red strike"))
    console.print(_line(None, critique.verdict.value, f"answer {critique.answer}", "bold"))


def _sent(request: CritiqueRequest, span: Span) -> str:
    return request.split().text[slice(*span)]


def _line(number: int | None, label: str, body: str, style: str) -> Text:
    head = "" if number is None else str(number)
    line = Text(f"{head:>3} {label:<10} ", style="dim")
    line.append(printable(" ".join(body.split())), style=style)
    return line
