"""``stepalign critique`` against a critic on a real socket."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from stepalign_critic.backends import create_backend
from stepalign_critic.service import CriticService
from stepalign_run.config import CriticServerSection
from support.critic_servers import serving, wait_until

pytestmark = pytest.mark.slow

RIGHT = {"question": "3 + 4 * 7", "attempt": "3 + 4 = 7\n7 * 7 = 9\n#### 9", "answer": "9"}
WRONG = {"question": "3 + 4 * 7", "attempt": "<step_1>3 + 4 = 7</step_1><step_2>7 * 7 = 1</step_2><answer>1</answer>"}
REFUSED = {**RIGHT, "answer": "5"}
IMPOSSIBLE = {"question": "Why?", "attempt": "Because."}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    backend = create_backend(CriticServerSection(backend="program", checker="lab", prompts="lab-v1"))
    with serving(CriticService(backend, "lab-v1")) as address:
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        yield address


class Loading(BaseHTTPRequestHandler):
    """Answers a server's first two requests as a critic does that is loading, in words that would steer a terminal."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        seen = vars(self.server).setdefault("seen", [])
        seen.append(self.path)
        status, code = (503, "loading") if len(seen) <= 2 else (422, "no")
        body = {"error": {"message": "loading\x1b[31m\u202e", "code": code}}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def deaf() -> Iterator[HTTPServer]:
    """A server that has its port and does not listen yet."""
    with HTTPServer(("127.0.0.1", 0), Loading, bind_and_activate=False) as server:
        server.server_bind()
        yield server


@contextmanager
def listening(server: HTTPServer) -> Iterator[None]:
    server.server_activate()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield
    server.shutdown()
    thread.join()


def critique(url: str, *words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepalign.cli", "critique", *words, "--url", url]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)


def file_of(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return str(path)


def test_each_step_is_shown_with_what_became_of_it(url: str, tmp_path: Path) -> None:
    done = critique(url, file_of(tmp_path, WRONG))
    assert done.returncode == 0, done.stderr
    lines = [re.sub(r"\s+", " ", line).strip() for line in done.stdout.splitlines()]
    assert lines[:5] == [
        "3 + 4 * 7",
        "1 copied 3 + 4 = 7",
        "2 was <step_2>7 * 7 = 1</step_2>",
        "2 corrected 7 * 7 = 9",
        "incorrect answer 9",
    ]


def test_an_answer_that_is_refused_is_shown_and_has_its_exit_code(url: str, tmp_path: Path) -> None:
    done = critique(url, file_of(tmp_path, RIGHT, REFUSED))
    assert done.returncode == 2
    assert "correct    answer 9" in done.stdout and "refused as verdict_disagrees" in done.stdout


def test_one_request_without_an_answer_does_not_spoil_the_others(url: str, tmp_path: Path) -> None:
    done = critique(url, file_of(tmp_path, IMPOSSIBLE, RIGHT), "--json")
    first, second = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1
    assert first["error"]["type"] == "CriticRequestError" and "cannot handle" in first["error"]["message"]
    assert second["critique"]["verdict"] == "correct"


def test_standard_input_is_read_and_may_be_one_indented_object(url: str) -> None:
    done = critique(url, "-", "--json", given=json.dumps(RIGHT, indent=2))
    assert done.returncode == 0 and json.loads(done.stdout)["critique"]["answer"] == "9"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no request"),
        ('{"question": "q"}', "send either attempt or steps"),
        ('{"question": "q", "attempt": "a"}\n{"question": "q", "attempt": 1}', "line 2: attempt"),
        ('{"question": "q", "attempt": "a"}\n{"quest', "line 2"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(text)
    done = critique("http://127.0.0.1:9", str(path))
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_no_text_steers_the_terminal_or_shows_in_another_order(url: str, tmp_path: Path) -> None:
    hostile = {**IMPOSSIBLE, "question": "a\x1b[31mb\u202ec\u2028d\u2066e\u200df\x07g é"}
    shown = critique(url, file_of(tmp_path, hostile)).stdout
    assert shown.splitlines()[0] == "a\ufffd[31mb\ufffdc\ufffdd\ufffde\u200df\ufffdg é"
    assert not set("\x1b\u202e\u2028\u2066\x07") & set(shown)


@pytest.mark.parametrize("words", [("--foo", "bar"), ("--jsno",), ("--critic.port", "1"), ("another",)])
def test_what_the_command_does_not_know_is_refused(url: str, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = critique(url, file_of(tmp_path, RIGHT), *words)
    assert done.returncode == 2 and words[0] in done.stderr and done.stdout == ""


def test_a_problem_file_is_told_from_a_file_of_requests(url: str, tmp_path: Path) -> None:
    done = critique(url, file_of(tmp_path, {"id": "p1", "question": "3 + 4", "answer": "7"}))
    assert done.returncode == 1 and "this looks like a problem file" in done.stderr


def test_where_nobody_listens_the_command_ends_at_once_with_one_line(deaf: HTTPServer, tmp_path: Path) -> None:
    began = time.monotonic()
    done = critique(f"http://127.0.0.1:{deaf.server_port}", file_of(tmp_path, RIGHT, WRONG), "--json")
    assert time.monotonic() - began < 30
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"stepalign: no critic listens at http://127.0.0.1:{deaf.server_port} (Connection refused)")
    assert "--url" in line and "--wait" in line


def test_the_command_waits_for_a_critic_that_is_started_beside_it(deaf: HTTPServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stepalign.cli", "critique", file_of(tmp_path, RIGHT), "--wait", "50"]
    url, pipe = f"http://127.0.0.1:{deaf.server_port}", subprocess.PIPE
    with subprocess.Popen([*command, "--url", url], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(
            f"nobody listens at {url} (Connection refused); waiting for up to 50 s"
        )
        with listening(deaf):
            stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "no answer: 422 no" in stdout


def test_retries_are_announced_once_with_their_end_and_steer_no_terminal(deaf: HTTPServer, tmp_path: Path) -> None:
    with listening(deaf):
        done = critique(f"http://127.0.0.1:{deaf.server_port}", file_of(tmp_path, RIGHT), "--timeout", "40")
    assert done.returncode == 1 and "no answer: 422 no: loading\ufffd[31m\ufffd" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "503 loading: loading\ufffd[31m\ufffd" in line
    assert "up to 40 s for each critique; --timeout" in line
