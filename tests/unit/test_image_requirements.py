"""The images: their environments hold the requirements of their extras, and figures in several files agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from stepalign_run.config import known_variables, load_config

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "deploy" / "requirements.py"
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = yaml.safe_load((REPO / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
BUILDS = {name: service["build"] for name, service in SERVICES.items() if "build" in service}
# The images that Compose builds: a target, and the critic's model library where it is not the first one.
IMAGES: dict[str, tuple[str, dict[str, str]]] = {
    "critic": ("critic", {}),
    "critic-vllm": ("critic", {"CRITIC_BACKEND": "vllm"}),
    "critic-vllm-cpu": ("critic", {"CRITIC_BACKEND": "vllm-cpu"}),
    "solver": ("solver", {}),
    "trainer": ("trainer", {}),
}

each_image = pytest.mark.parametrize("name", IMAGES)


def instructions() -> list[str]:
    """The instructions of the Dockerfile, without comments, each on one line."""
    lines = (REPO / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def arguments() -> dict[str, str]:
    """The build arguments that have a default."""
    return {m[1]: m[2] for line in instructions() if (m := re.fullmatch(r"ARG (\w+)=(\S*)", line))}


def stages() -> dict[str, tuple[str, list[str]]]:
    """For each stage its base, in which build arguments are not replaced yet, and its instructions."""
    found: dict[str, tuple[str, list[str]]] = {}
    own: list[str] = []
    for line in instructions():
        if heading := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            own = []
            found[heading[2]] = (heading[1], own)
        else:
            own.append(line)
    return found


def image(target: str, chosen: dict[str, str] | None = None) -> list[str]:
    """The instructions of a target and of the stages below it, the lowest first."""
    base, own = stages()[target]
    for name, value in (arguments() | (chosen or {})).items():
        base = base.replace(f"${{{name}}}", value)
    return own if target == "base" else image(base) + own


def last(found: list[str], keyword: str) -> str:
    return [line for line in found if line.split()[0] == keyword][-1].removeprefix(keyword).strip()


def lists() -> dict[str, list[str]]:
    """The extras that the Dockerfile asks requirements.py for, by the file that gets the answer."""
    calls = re.findall(r"python requirements\.py ([^>]*)> (\S+)", " ".join(instructions()))
    return {name: extras.split() for extras, name in calls}


def printed(*extras: str, folder: Path = REPO) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *extras], capture_output=True, text=True, timeout=30, cwd=folder)


def installed_requirements(extras: list[str]) -> set[Requirement]:
    """The requirements that the build backend wrote into our own package's metadata for these extras."""
    found: set[Requirement] = set()
    for line in requires("stepalign") or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            requirement.marker = None
            found.add(requirement)
    return found


def test_every_environment_installs_a_list_of_its_own() -> None:
    copied = re.findall(r"COPY --from=requirements /app/(\S+)", "\n".join(instructions()))
    installed = re.findall(r" -r /opt/stepalign/(\S+)", "\n".join(instructions()))
    assert sorted(copied) == sorted(installed) == sorted(lists())


@pytest.mark.parametrize(("name", "extras"), lists().items(), ids=list(lists()))
def test_a_list_is_the_requirements_of_its_extras(name: str, extras: list[str]) -> None:
    done = printed(*extras)
    assert (done.returncode, done.stderr) == (0, ""), name
    listed = [Requirement(line) for line in done.stdout.splitlines()]
    names = [requirement.name for requirement in listed]
    assert set(listed) == installed_requirements(extras)
    assert len(names) == len(set(names)) and "stepalign" not in names
    assert "pydantic" in names and not {"pytest", "gguf"} & set(names)


NESTED = """
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
    (tmp_path / "pyproject.toml").write_text(NESTED)
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


def test_the_images_need_no_newer_engine_than_the_manual_names() -> None:
    """A newer engine takes all of these without a word."""
    text = (REPO / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"^\s*#\s*(syntax|escape|check)\s*=", text, re.MULTILINE | re.IGNORECASE)
    for line in instructions():
        assert "<<" not in line
        assert not re.match(r"(COPY|ADD)\b.*\s--(link|chmod|parents|exclude)\b", line), line
        assert not re.match(r"RUN\b.*\s--(mount|network|security)\b", line), line
        assert not re.match(r"FROM .*--platform=\$(BUILD|TARGET)PLATFORM", line), line


@each_image
def test_an_image_runs_a_command_of_ours_as_a_user_without_rights(name: str) -> None:
    target, chosen = IMAGES[name]
    lines = image(target, chosen)
    user = lines.index("USER stepalign")
    assert not [line for line in lines[user:] if line.startswith(("RUN ", "COPY ", "ADD ")) or "USER root" in line]
    assert "useradd --uid 10001 --gid 10001" in " ".join(lines)
    assert json.loads(last(lines, "ENTRYPOINT")) == ["stepalign"]
    command, config = json.loads(last(lines, "CMD"))
    assert command == target and command in entry_points(group="stepalign.commands").names
    assert (REPO / config).exists()


@each_image
def test_an_image_checks_its_health_where_its_process_shows_it(name: str) -> None:
    target, chosen = IMAGES[name]
    lines = image(target, chosen)
    health = last(lines, "HEALTHCHECK")
    environment = " ".join(line for line in lines if line.startswith("ENV ")) + " "
    assert 'CMD ["python", "-I", "-S", "healthcheck.py", ' in health
    if target == "critic":
        port = last(lines, "EXPOSE")
        assert f'"http://127.0.0.1:{port}/health/ready"]' in health
        assert f"STEPALIGN_CRITIC__PORT={port} " in environment
    else:
        beaten = re.search(r"STEPALIGN_RUN__HEARTBEAT_FILE=(\S+)", environment)
        assert beaten and f'"{beaten[1]}", "60"]' in health


@each_image
def test_an_image_is_labelled_after_its_last_step(name: str) -> None:
    target, chosen = IMAGES[name]
    lines = image(target, chosen)
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', "\n".join(lines)))
    assert labels == {
        "title": f"stepalign {target}",
        "version": "${VERSION}",
        "revision": "${REVISION}",
        "licenses": "Apache-2.0",
    }
    steps = [number for number, line in enumerate(lines) if line.startswith(("RUN ", "COPY "))]
    assert lines.index("ARG VERSION") > max(steps) < lines.index("ARG REVISION")


def test_versions_are_those_of_the_package_and_of_make_setup() -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    defaults = arguments()
    assert defaults["VERSION"] == PROJECT["project"]["version"]
    for name in ("TORCH_VERSION", "TORCH_INDEX"):
        (value,) = re.findall(rf"^{name} \?= (\S+)$", makefile, re.MULTILINE)
        assert defaults[name] == value
    (tested,) = re.findall(r"^VLLM_PACKAGE \?= vllm-cpu==(\S+)$", makefile, re.MULTILINE)
    assert defaults["VLLM_VERSION"] == tested


@each_image
def test_the_environment_of_an_image_is_of_known_variables(name: str) -> None:
    target, chosen = IMAGES[name]
    named = re.findall(r"\b(STEPALIGN_\w+)=", "\n".join(image(target, chosen)))
    assert named and set(named) <= known_variables()


@pytest.mark.parametrize("service", BUILDS)
def test_compose_builds_a_target_and_passes_arguments_that_exist(service: str) -> None:
    """Docker only warns of an unknown argument, and nothing builds the images of the profile gpu in a test."""
    build = BUILDS[service]
    assert build["dockerfile"] == "deploy/Dockerfile" and build["target"] == service.partition("-")[0]
    assert set(build["args"]) <= set(arguments())
    chosen = {name: value for name, value in build["args"].items() if name == "CRITIC_BACKEND"}
    assert (build["target"], chosen) in IMAGES.values()


def test_the_critic_of_the_profile_gpu_has_its_configurations_backend() -> None:
    backend = load_config(REPO / "configs" / "paper.toml", [], {}).critic.backend
    assert BUILDS["critic-gpu"]["args"]["CRITIC_BACKEND"] == backend == "vllm"
    lines = " ".join(image("critic", {"CRITIC_BACKEND": backend}))
    assert "-r /opt/stepalign/critic-vllm.txt" in lines and "torch==" not in lines


def test_the_critic_of_the_profile_vllm_cpu_is_installed_as_make_test_vllm_installs_it() -> None:
    lines = " ".join(image("critic", {"CRITIC_BACKEND": BUILDS["critic-vllm-cpu"]["args"]["CRITIC_BACKEND"]}))
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert "vllm-cpu==${VLLM_VERSION}" in lines and "torch==${TORCH_VERSION}" in lines
    (removed,) = re.findall(r"uninstall --quiet --yes (.+)", makefile)
    assert f"uninstall --yes {removed}" in lines
    # The official vLLM beside the community's build would be a second package of the same modules.
    assert not [line for line in printed(*lists()["critic-vllm-cpu.txt"]).stdout.splitlines() if "vllm" in line]
    options = SERVICES["critic-vllm-cpu"]["command"][2:]
    section = load_config(REPO / "configs" / "smollm2.toml", options, {}).critic
    assert (section.backend, section.vllm.engine_args) == ("vllm", {"enforce_eager": True})


@pytest.mark.parametrize(("backend", "named"), [("vllm", ""), ("vllm-cpu", " libnuma1")])
def test_a_critic_on_vllm_has_a_compiler_and_what_its_kernels_load(backend: str, named: str) -> None:
    """The engine compiles with its first request, and without libnuma vLLM's kernels for CPUs are not there at all."""
    lines = image("critic", {"CRITIC_BACKEND": backend})
    script = "/opt/stepalign/vllm-packages.sh"
    installed = lines.index(f"RUN sh {script}{named}")
    assert lines.index("COPY deploy/vllm-packages.sh /opt/stepalign/") < installed < lines.index("ARG VLLM_VERSION")
    assert subprocess.run(["sh", "-n", REPO / "deploy" / "vllm-packages.sh"], timeout=30, check=False).returncode == 0


def test_only_the_sources_of_an_image_get_into_a_build() -> None:
    lines = (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert all((REPO / path).exists() for path in let_in)
    assert not {"runs", "tests", ".git", ".venv", ".env", ".cache", "data", "*", ".", ""} & set(let_in)
    # All that is copied, and all that the build backend reads.
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = {
        source
        for line in instructions()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    about = PROJECT["project"]
    needed = {*copied, *packages, "configs", about["readme"], *about["license-files"]} - {"."}
    missing = {path for path in needed if not {path, path.partition("/")[0]} & set(let_in)}
    assert missing == set()
