"""The grader ``math``: what is equal, what is not, what is unknown, and that no answer can hang or fill the machine."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from stepalign.graders import worker
from stepalign.graders.math import MAX_CHARACTERS, POOL, math_equal
from stepalign.graders.plain import plain
from stepalign.plugins import load_grader

COSTLY = "9**9**9"
"""A number of 370 million digits."""

EQUAL = [
    (r"\boxed{12}", "12"),
    (r"\(12\)", "12"),
    ("**12**", "12"),
    (r"$\boxed{12}$.", "12"),
    ("x = 12", "12"),
    ("**x = 12**", "12"),
    ("12 students", "12"),
    (r"\boxed{12} students", "12"),
    ("1{,}000", "1000"),
    (r"1\,000", "1000"),
    ("1 000", "1,000"),
    (r"\frac12", "0.5"),
    (r"\frac12", "1/2"),
    (r"\dfrac{1}{2}", "0.5"),
    (r"2\frac12", "5/2"),
    ("2 1/2", "2.5"),
    (r"2\sqrt{3}", r"2\sqrt3"),
    (r"2\sqrt{3}", "sqrt(12)"),
    ("(6,5)", "(6, 5)"),
    (r"\left(6, 5\right)", "(6,5)"),
    (r"50\%", "50"),
    (r"50\%", "50%"),
    (r"50\%", "0.5"),
    ("50 percent", "50%"),
    (r"30^\circ", "30"),
    ("30°", "30 degrees"),
    ("\u22125", "-5"),
    (r"\$5", "5"),
    ("$5", "5 dollars"),
    (r"5 \text{ cm}", "5"),
    (r"5 \text{ cm}^2", "5"),
    ("5 km/h", r"5 \text{ km/h}"),
    (r"\text{Paris}", "paris"),
    ("(x+1)^2", "x^2 + 2x + 1"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    ("x = 1 or x = 2", "x = 2 or x = 1"),
    ("2**10", "1024"),
    (r"\text{(A)}", "A"),
]
UNEQUAL = [
    ("12", "13"),
    ("12", "1.2"),
    ("1/2", "1/3"),
    (r"\frac12", r"\frac13"),
    ("(6,5)", "(5,6)"),
    ("[1, 2)", "(1, 2)"),
    ("12 students", "13 students"),
    ("12 or 13", "12"),
    ("Paris", "London"),
    ("listen", "silent"),
    ("Paris 12", "London 12"),
    ("not 12", "12"),
    ("yes", "no"),
    ("A", "B"),
    ("x = 1", "y = 1"),
    ("2x", "2"),
    ("5m", "5"),
    (r"3\pi", "3"),
    ("50%", "5"),
    ("-5", "5"),
    (r"\frac{1}{3}", "0.333333"),
    (r"\sqrt{2}", "1.414214"),
    ("", "12"),
    ("", ""),
    (" ", "0"),
    (r"\boxed{}", "0"),
    (r"\frac{1", "1"),
]
UNKNOWN = [("5 cm", "5 km"), ("12 students", "12 teachers"), ("12 million", "12000000")]

either_way = pytest.mark.parametrize("swapped", [False, True], ids=["as is", "swapped"])


@either_way
@pytest.mark.parametrize(("answer", "known"), EQUAL)
def test_answers_that_mean_the_same_are_equal(answer: str, known: str, swapped: bool) -> None:
    assert math_equal(*((known, answer) if swapped else (answer, known))) is True


@either_way
@pytest.mark.parametrize(("answer", "known"), UNEQUAL)
def test_answers_that_mean_something_else_are_not(answer: str, known: str, swapped: bool) -> None:
    assert math_equal(*((known, answer) if swapped else (answer, known))) is False


@either_way
@pytest.mark.parametrize(("answer", "known"), UNKNOWN)
def test_equal_numbers_with_unlike_units_are_unknown(answer: str, known: str, swapped: bool) -> None:
    assert math_equal(*((known, answer) if swapped else (answer, known))) is None


def test_what_numbers_and_words_decide_starts_no_process() -> None:
    """In a process of its own: this one may have asked already."""
    code = """
from stepalign.graders.math import POOL, math_equal
said = [math_equal("12 students", "12"), math_equal("12", "13"), math_equal("Paris", "London"),
        math_equal("(6,5)", "(6, 5)"), math_equal(r"\\frac12", "0.5"), math_equal("7" * 5000, "7")]
print(said, POOL.pids())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[True, False, False, True, True, False] []\n", done.stderr


@either_way
@pytest.mark.parametrize(
    ("answer", "known", "at_once"),
    [
        ("94.86", "98.43", True),
        (r"\frac12", "0.5", True),
        ("12 students", "12 teachers", True),
        ("Paris", "London", True),
        ("", "12", True),
        ("x + 1", "1 + x", False),
        ("9**9**9", "12", False),
        ("7" * 500, "7" * 500, False),
        ("\\sqrt{" * 100, "12", False),
    ],
)
def test_it_tells_whether_it_will_ask_a_process(answer: str, known: str, at_once: bool, swapped: bool) -> None:
    assert math_equal.at_once(*((known, answer) if swapped else (answer, known))) is at_once


# Hostile answers.

HOSTILE = {
    "nested braces": "{" * 10_000 + "12" + "}" * 10_000,
    "open braces": r"\frac{" * 10_000,
    "a megabyte of digits": "7" * 2**20,
    "a megabyte of words": "ab " * 2**18,
    "a megabyte of blanks before it": " " * 2**20 + "13",
    "nested within the limit": r"\sqrt{" * 140 + "2" + "}" * 140,
    "brackets": "(" * 900,
    "fractions": r"\frac" * 190,
    "units": "1 " + "ab " * 300,
    "dollars": "$" * 999,
    "equations": "x=" * 480 + "1",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_soon_no_right_one(name: str) -> None:
    assert math_equal(HOSTILE[name], "12") is not True
    assert math_equal("12", HOSTILE[name]) is not True


def test_an_answer_of_great_length_is_compared_as_text() -> None:
    long = "x" * (MAX_CHARACTERS + 1)
    assert math_equal(long, long.upper()) is True
    assert math_equal(f"\\boxed{{12}}{' ' * MAX_CHARACTERS}.", "12") is False


def test_plain_forms_are_found_in_little_time() -> None:
    """Of any text within the limit: no expression runs away."""
    random.seed(0)
    parts = ["\\", "{", "}", "$", "frac", "text", " ", "12", "ab", ",", "=", "^", "%", "circ", "boxed", ".", "(", ")"]
    texts = ["".join(random.choices(parts, k=400))[:MAX_CHARACTERS] for _ in range(300)]
    texts += [part * (MAX_CHARACTERS // len(part)) for part in [*parts, "1 ", "a ", "\\text{", "a-b ", "1,"]]
    before = time.process_time()
    for text in texts:
        plain(text)
    assert time.process_time() - before < 10


def test_long_answers_do_not_stay_in_memory() -> None:
    tracemalloc.start()
    try:
        for count in range(30):
            assert math_equal(f"{count}" + "7" * 2**20, f"{count}8") is False
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 8 * 2**20


def test_a_costly_answer_is_unknown_and_the_next_one_is_answered() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert math_equal(COSTLY, "12") is None
    assert math_equal("y + 1", "1 + y") is True
    # In kibibytes (macOS: bytes): the number itself would take 150 MB, and it is not made here.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


def test_a_worker_that_dies_is_replaced() -> None:
    assert math_equal("z + 1", "1 + z") is True
    for pid in POOL.pids():
        os.killpg(pid, signal.SIGKILL)
    assert math_equal("z + 2", "2 + z") in (True, None)
    assert math_equal("z + 3", "3 + z") is True


def test_what_a_lost_worker_left_unknown_is_asked_again() -> None:
    assert math_equal("q + 1", "1 + q") is True
    pids = POOL.pids()
    for pid in pids:
        os.killpg(pid, signal.SIGSTOP)
    said: list[bool | None] = []
    thread = threading.Thread(target=lambda: said.append(math_equal("q + 2", "2 + q")))
    thread.start()
    thread.join(0.5)
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)
    thread.join()
    assert said == [None]
    assert math_equal("q + 2", "2 + q") is True


def test_threads_are_answered_each_by_its_own_question() -> None:
    said: dict[int, bool | None] = {}

    def ask(number: int) -> None:
        said[number] = math_equal(f"w + {number}", f"{number - number % 2} + w")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {number: number % 2 == 0 for number in range(12)}


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    """Whether it has ended; a zombie, which waits for an absent parent, has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


ASKS = """
import sys, threading
from stepalign.graders.math import POOL, math_equal
print(math_equal("x + 1", "1 + x"), *POOL.pids(), flush=True)
if sys.argv[1] == "busy":
    threading.Thread(target=math_equal, args=("9**9**9", "12"), daemon=True).start()
if sys.argv[1] != "end":
    print("asked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_child_that_dies_between_questions_shifts_no_answer() -> None:
    assert math_equal("v + 1", "1 + v") is True
    for pid in POOL.pids():
        for child in children_of(pid):
            os.kill(child, signal.SIGKILL)
    said = [math_equal(f"v + {i}", f"{i - i % 2} + v") for i in range(2, 12)]
    assert all(found in (i % 2 == 0, None) for i, found in enumerate(said, start=2))
    assert said[-2:] == [True, False]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("how", ["end", "idle", "busy"])
def test_no_worker_outlives_its_parent(how: str) -> None:
    """Which ends by itself, or is killed while its workers wait or compute. It is a script without a guard."""
    command = [sys.executable, "-c", ASKS, how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said, *pids = parent.stdout.readline().split()
        assert said == "True" and len(pids) == 1
        workers = [int(pid) for pid in pids]
        if how == "end":
            assert parent.wait(60) == 0
        else:
            workers += children_of(workers[0])
            assert parent.stdout.readline() == "asked\n"
            parent.kill()
            parent.wait(60)
    until = time.monotonic() + 90
    while not all(map(is_gone, workers)):
        assert time.monotonic() < until, "a worker is still there"
        time.sleep(0.1)


def test_a_fork_of_the_process_has_workers_of_its_own() -> None:
    code = """
import os
from stepalign.graders.math import POOL, math_equal
assert math_equal("x + 1", "1 + x") is True
child = os.fork()
if child == 0:
    os._exit(0 if POOL.pids() == [] and math_equal("x + 2", "2 + x") is True else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), math_equal("x + 3", "3 + x"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 True\n", done.stderr


def test_a_worker_answers_lines_and_ends_with_its_input() -> None:
    lines = '[1, "x+1", "1+x"]\n[2, "x", "y"]\n'
    command = [sys.executable, "-P", worker.__file__]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ('"ready"\n[1, true]\n[2, false]\n', 0), done.stderr


@pytest.mark.slow
def test_many_answers_with_hostile_ones_among_them() -> None:
    """Three hundred, each of its own, one in a hundred of which costs all that it may."""
    grader = load_grader("math")
    said = [
        grader(f"9**9**9**{i}", "12") if i % 100 == 99 else grader(f"t + {i}" if i % 10 else f"{i} items", f"{i}")
        for i in range(300)
    ]
    costly = [judgement for i, judgement in enumerate(said) if i % 100 == 99]
    others = [judgement for i, judgement in enumerate(said) if i % 100 != 99]
    assert True not in costly
    assert others == [i % 10 == 0 for i in range(300) if i % 100 != 99]
