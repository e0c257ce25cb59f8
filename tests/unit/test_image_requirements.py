"""The images: what they install is what their extras require, and the three Dockerfiles do not drift apart."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "deploy" / "requirements.py"
DOCKERFILES = {
    "critic": REPO / "services" / "critic" / "Dockerfile",
    "solver": REPO / "services" / "solver" / "Dockerfile",
    "trainer": REPO / "trainer" / "Dockerfile",
}
EXTRAS = {"critic": ["critic-transformers", "critic-openai"], "solver": ["solver"], "trainer": ["trainer"]}

each_image = pytest.mark.parametrize("image", DOCKERFILES)


def instructions(image: str) -> list[str]:
    """The instructions of an image's Dockerfile, without comments, each on one line."""
    lines = DOCKERFILES[image].read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def final_stage(image: str) -> list[str]:
    found = instructions(image)
    return found[max(index for index, line in enumerate(found) if line.startswith("FROM ")) :]


def only(found: list[str], keyword: str) -> str:
    (line,) = [line for line in found if line.split()[0] == keyword]
    return line.removeprefix(keyword).strip()


def default_of(image: str, argument: str) -> str:
    (value,) = {m[1] for line in instructions(image) if (m := re.fullmatch(rf"ARG {argument}=(\S*)", line))}
    return value


def extras_of(image: str) -> list[str]:
    """The arguments with which the image calls requirements.py."""
    (called,) = [m[1] for line in instructions(image) if (m := re.search(r"python requirements\.py ([^>]*)>", line))]
    return called.split()


def printed(*extras: str, folder: Path = REPO) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *extras], capture_output=True, text=True, timeout=30, cwd=folder)


def installed_requirements(extras: list[str]) -> set[Requirement]:
    """What the build backend wrote into our own package's metadata for these extras; it follows nested ones."""
    found: set[Requirement] = set()
    for line in requires("stepalign") or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            requirement.marker = None
            found.add(requirement)
    return found


@each_image
def test_an_image_names_the_extras_of_its_process(image: str) -> None:
    assert extras_of(image) == EXTRAS[image]


@each_image
def test_an_image_installs_what_its_extras_require(image: str) -> None:
    done = printed(*extras_of(image))
    assert (done.returncode, done.stderr) == (0, "")
    listed = [Requirement(line) for line in done.stdout.splitlines()]
    names = [requirement.name for requirement in listed]
    assert set(listed) == installed_requirements(extras_of(image))
    assert len(names) == len(set(names)) and "stepalign" not in names
    assert {"torch", "pydantic"} <= set(names) and not {"pytest", "gguf"} & set(names)


PROJECT = """
[project]
name = "own"
dependencies = ["base>=1"]
[project.optional-dependencies]
deep = ["deepest<2"]
middle = ["own[deep,side]", "base>=1"]
side = ["beside[extra]>=3; python_version >= '3'"]
top = ["own[middle]", "own-plugin>=1", "deepest<2"]
"""


def test_nested_extras_are_followed_and_nothing_is_listed_twice(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    side = "beside[extra]>=3; python_version >= '3'"
    assert printed("top", "deep", folder=tmp_path).stdout.splitlines() == [
        "base>=1",
        "deepest<2",
        side,
        "own-plugin>=1",
    ]
    assert printed(folder=tmp_path).stdout.splitlines() == ["base>=1"]


def test_an_unknown_extra_fails() -> None:
    done = printed("solver", "solvr")
    assert done.returncode != 0 and "solvr" in done.stderr
    assert done.stdout == ""


def parts(image: str) -> tuple[str, str, str]:
    """A Dockerfile down to the environment that all have, its own part, and the labels."""
    text = DOCKERFILES[image].read_text(encoding="utf-8")
    head, environment, tail = text.partition(" PYTHONWARNINGS=ignore::FutureWarning:transformers.modeling_utils\n")
    own, last, labels = tail.partition("# Last, so that another version")
    assert environment and last and own and "FROM" not in tail
    return head, own, labels


def common_part(image: str) -> str:
    """What all have, with what may differ replaced."""
    head, _, labels = parts(image)
    head += labels
    for own in (f"The {image}'s image", f"-f {DOCKERFILES[image].relative_to(REPO)} ", f'title="stepalign {image}"'):
        assert head.count(own) == 1, own
        head = head.replace(own, "<own>")
    call = f"requirements.py {' '.join(extras_of(image))} >"
    assert head.count(call) == 1
    return head.replace(call, "<own>")


def test_the_dockerfiles_differ_in_title_extras_and_tail_only() -> None:
    assert common_part("critic") == common_part("solver") == common_part("trainer")


def test_solver_and_trainer_differ_in_their_command_only() -> None:
    own = {image: parts(image)[1] for image in DOCKERFILES}
    assert own["solver"].replace('["solver", ', '["trainer", ') == own["trainer"]


@each_image
def test_an_image_needs_no_frontend_of_buildkit(image: str) -> None:
    text = DOCKERFILES[image].read_text(encoding="utf-8")
    assert not re.search(r"^\s*#\s*(syntax|escape|check)\s*=", text, re.MULTILINE | re.IGNORECASE)
    for line in instructions(image):
        assert "<<" not in line
        assert not re.match(r"(COPY|ADD)\b.*\s--(link|chmod|parents|exclude)\b", line), line
        assert not re.match(r"RUN\b.*\s--(mount|network|security)\b", line), line
        assert not re.match(r"FROM .*--platform=\$(BUILD|TARGET)PLATFORM", line), line


@each_image
def test_an_image_runs_its_process_as_a_user_without_rights(image: str) -> None:
    stage = final_stage(image)
    assert [line for line in stage if line.startswith("USER ")] == ["USER stepalign"]
    assert "useradd --uid 10001 --gid 10001" in " ".join(stage)
    assert only(stage, "ENTRYPOINT") == '["stepalign"]'
    assert only(stage, "CMD") == f'["{image}", "configs/lab.toml"]'
    user = stage.index("USER stepalign")
    assert not [line for line in stage[user:] if line.startswith(("RUN ", "COPY "))]


@each_image
def test_an_image_checks_its_health_and_the_arguments_are_right(image: str) -> None:
    stage = final_stage(image)
    health = only(stage, "HEALTHCHECK")
    assert 'CMD ["python", "-I", "-S", "healthcheck.py", ' in health
    assert "COPY deploy/healthcheck.py ./" in stage
    environment = " ".join(line for line in stage if line.startswith("ENV "))
    if image == "critic":
        port = only(stage, "EXPOSE")
        assert f'"http://127.0.0.1:{port}/health/ready"]' in health
        assert f"STEPALIGN_CRITIC__PORT={port} " in environment + " "
    else:
        beaten = re.search(r"STEPALIGN_RUN__HEARTBEAT_FILE=(\S+)", environment)
        assert beaten and f'"{beaten[1]}", "60"]' in health


@each_image
def test_an_image_is_labelled_with_its_version(image: str) -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', only(final_stage(image), "LABEL")))
    assert labels == {
        "title": f"stepalign {image}",
        "version": "${VERSION}",
        "revision": "${REVISION}",
        "licenses": "Apache-2.0",
    }
    arguments = [line for line in final_stage(image) if line.startswith("ARG ")]
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert arguments == [f"ARG VERSION={project['version']}", "ARG REVISION=unknown"]


@each_image
@pytest.mark.parametrize("name", ["TORCH_VERSION", "TORCH_INDEX"])
def test_an_image_has_the_torch_of_make_setup(image: str, name: str) -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    (value,) = re.findall(rf"^{name} \?= (\S+)$", makefile, re.MULTILINE)
    assert default_of(image, name) == value


def test_the_environment_of_an_image_is_of_known_variables() -> None:
    from stepalign_run.config import known_variables

    for image in DOCKERFILES:
        named = re.findall(r"\b(STEPALIGN_\w+)=", "\n".join(instructions(image)))
        assert named and set(named) <= known_variables()


def test_only_what_is_named_gets_into_a_build() -> None:
    lines = (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert all((REPO / path).exists() for path in let_in)
    assert not {"runs", "tests", ".git", ".venv", ".env", ".cache", "data", "*", ".", ""} & set(let_in)
    # All that is copied, and what the build backend reads.
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = {
        source
        for image in DOCKERFILES
        for line in instructions(image)
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    needed = {*copied, *packages, project["project"]["readme"], *project["project"]["license-files"]} - {"."}
    missing = {path for path in needed if not {path, path.partition("/")[0]} & set(let_in)}
    assert missing == set()
