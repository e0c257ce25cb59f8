"""The archives of this checkout, built once, and the environments that hold their wheel."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from support.distributions import Archives, Environment, build_archives, make_environment


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    return build_archives(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="session")
def bare(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that was empty before ``pip install stepalign``."""
    return make_environment(tmp_path_factory.mktemp("bare"), archives.wheel)


@pytest.fixture(scope="session")
def with_lab(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel and the dependencies of its extra ``lab``.

    The dependencies are the test environment's. Its folder stands in a ``.pth`` file, and Python reads no further
    ``.pth`` files there. So the editable install of this repository stays out, and only the wheel's code can run.
    """
    environment = make_environment(tmp_path_factory.mktemp("lab"), "--no-deps", archives.wheel)
    own = Path(environment.printed("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment
