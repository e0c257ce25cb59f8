"""The distribution that others install: its files, its dependencies, and its work in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.critic_processes import critic_process, write_config
from support.distributions import REPO, Archives, Environment

pytestmark = pytest.mark.slow

PACKAGES = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
    "packages"
]


def files_of_packages(tracked: list[str]) -> set[str]:
    """The tracked files of all packages, as a wheel names them."""
    roots = [f"{Path(package).parent}/" for package in PACKAGES]
    return {
        name.removeprefix(root)
        for name in tracked
        for root, package in zip(roots, PACKAGES, strict=True)
        if name.startswith(f"{package}/")
    }


def packed(wheel: Path) -> set[str]:
    """The files of a wheel without its metadata."""
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_files_of_the_packages_and_no_other(archives: Archives) -> None:
    expected = files_of_packages(archives.tracked)
    assert packed(archives.direct) == expected
    assert packed(archives.wheel) == expected


@pytest.mark.parametrize(
    "name",
    [
        "stepalign/py.typed",
        "stepalign/prompts/chat-v1/critique.txt",
        "stepalign_run/config/arms/stepalign.toml",
        "stepalign_lab/assets/lab.toml",
        "stepalign_lab/assets/solver/model.safetensors",
        "stepalign_report/page/assets/report.html",
    ],
)
def test_the_wheel_holds_the_data_of_its_packages(archives: Archives, name: str) -> None:
    assert name in packed(archives.wheel)


def test_the_sdist_holds_every_package_as_it_is(archives: Archives) -> None:
    with tarfile.open(archives.sdist) as archive:
        (root,) = {member.name.split("/")[0] for member in archive.getmembers()}
        names = {member.name.removeprefix(f"{root}/") for member in archive.getmembers()}
    packages = {name for name in archives.tracked for package in PACKAGES if name.startswith(f"{package}/")}
    assert packages | {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names


def test_twine_accepts_both_archives(archives: Archives) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", str(archives.sdist), str(archives.wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def required(wheel: Path) -> list[Requirement]:
    """The requirements that the wheel names, without those of extras."""
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    return [found for line in metadata.get_all("Requires-Dist", []) if applies(found := Requirement(line))]


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """The names of these requirements and of all that they need, by the test environment's metadata."""
    names: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        assert not requirement.extras, f"{requirement}: follow its extras here"
        name = canonicalize_name(requirement.name)
        if name not in names and applies(requirement):
            names.add(name)
            waiting += map(Requirement, requires(name) or [])
    return names


def test_the_wheel_alone_brings_pydantic_httpx_and_their_needs(archives: Archives, bare: Environment) -> None:
    expected = closure([Requirement("pydantic"), Requirement("httpx")])
    assert closure(required(archives.wheel)) == expected
    code = "from importlib.metadata import distributions; print(*(d.name for d in distributions()))"
    assert {canonicalize_name(name) for name in bare.printed(code).split()} == expected | {"stepalign"}


ASK = """
import asyncio, sys
from stepalign import CriticClient, CritiqueRequest, SyncCriticClient

request = CritiqueRequest(question="3 + 4 * 7 - 2", attempt="<step_1> 3 + 4 = 7 </step_1> <step_2> 7 * 7 = 8 </step_2>")

async def ask():
    async with CriticClient(sys.argv[1]) as critic:
        await critic.wait_ready()
        return await critic.critique(request)

first = asyncio.run(ask())
with SyncCriticClient(sys.argv[1]) as critic:
    second = critic.critique(request)
print(first.critique.verdict, first.critique.first_error_step, second.context == first.context)
"""


def test_the_wheel_alone_asks_a_critic(bare: Environment, tmp_path: Path) -> None:
    with critic_process(write_config(tmp_path)) as (_, url):
        assert bare.printed(ASK, url).split() == ["incorrect", "2", "True"]


@pytest.mark.parametrize(
    ("arguments", "extra"), [([], "cli"), (["--help"], "cli"), (["critique", "-"], "cli"), (["critic"], "critic")]
)
def test_the_wheel_alone_names_the_extra_of_its_command(bare: Environment, arguments: list[str], extra: str) -> None:
    done = bare.run("stepalign", *arguments)
    said = f"stepalign: the module 'typer' is missing: pip install 'stepalign[{extra}]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_the_wheel_alone_names_the_extra_of_a_grader(bare: Environment) -> None:
    code = """
from stepalign import ConfigError, load_grader
print(load_grader("exact")("1/2", "0.5"))
try:
    load_grader("math")
except ConfigError as error:
    print(error)
"""
    first, second = bare.printed(code).splitlines()
    assert first == "True" and "pip install 'stepalign[math]'" in second


def test_with_the_lab_every_command_is_there(with_lab: Environment) -> None:
    done = with_lab.run("stepalign", "--help")
    assert done.returncode == 0, done.stderr
    assert "not installed" not in done.stdout and "  critic " in done.stdout


def test_with_the_lab_it_runs_three_updates(with_lab: Environment) -> None:
    where = "import stepalign, stepalign_lab.commands as lab; print(stepalign.__file__, lab.__file__, sep='\\n')"
    sdk, lab = map(Path, with_lab.printed(where).split())
    assert sdk.is_relative_to(with_lab.root) and lab.is_relative_to(with_lab.root)
    options = ["--trainer.steps", "3", "--evaluation.every", "3"]
    done = with_lab.run("stepalign", "run", str(lab.parent / "assets" / "lab.toml"), *options, seconds=400)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((with_lab.folder / "runs" / "lab" / "report.json").read_text())
    assert report["steps"] == 3
    assert report["rollouts"]["published"] == 3 * 32
