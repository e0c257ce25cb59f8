"""Configuration of a run: one TOML file for every process, overridable by environment and command line.

Precedence, highest first: command line (``--trainer.steps 50``), environment (``STEPALIGN_TRAINER__STEPS=50``), the
file. Unknown keys are refused in all three. Paths of models and problems in the file are relative to the file's folder
(a link is followed first); ``run.dir`` and paths from the command line or the environment to the working directory.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from stepalign.errors import ConfigError
from stepalign_run.config.arm import TableSection
from stepalign_run.config.base import DELIMITER, ENV_PREFIX
from stepalign_run.config.run import Config, RunSection

_PATHS = (
    ("run", "arm"),
    ("model", "path"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
    ("critic", "path"),
)


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    environ: dict[str, str] | None = None,
    unread: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Read a TOML file with overrides such as ``["--trainer.steps", "50"]``.

    ``unread`` stands in for required values of sections that the caller does not read, where nothing gives them.
    Raises ConfigError with a message that names every unknown or invalid key.
    """
    values = _read_toml(path)
    env = dict(os.environ if environ is None else environ)
    _refuse_unknown_variables(env)
    arms: list[str] = []

    class _Sources(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            command_line = CliSettingsSource[Any](settings_cls, cli_parse_args=list(overrides))
            sources = (command_line, _Environment(settings_cls, env), init_settings)
            arms.extend(arm for source in sources if (arm := _arm_named_by(source())) is not None)
            arm, _ = _read_arm(arms[0] if arms else RunSection().arm)
            return *sources, InitSettingsSource(settings_cls, {**(unread or {}), "arm": arm})

    try:
        settings = _Sources(**values)
    except ValidationError as error:
        about_the_arm = arms and any(item["loc"][:1] == ("arm",) for item in error.errors())
        where = f"{path} with run.arm {arms[0]}" if about_the_arm else path
        given = [option.partition("=")[0] for option in overrides]
        keys = {f"--{'.'.join(map(str, item['loc']))}" for item in error.errors()}
        where = "command line" if keys <= set(given) else where
        raise ConfigError(f"{where}: {_explain(error)}") from None
    except SettingsError as error:
        raise ConfigError(f"command line: {str(error).removeprefix('error parsing CLI: ')}") from None
    return Config.model_construct(**{name: getattr(settings, name) for name in Config.model_fields})


class _Environment(EnvSettingsSource):
    def __init__(self, settings_cls: type[BaseSettings], environ: dict[str, str]) -> None:
        self._environ = environ
        super().__init__(settings_cls)

    def _load_env_vars(self) -> dict[str, str | None]:
        return {key.lower(): value for key, value in self._environ.items()}


def _read_table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a TOML file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    values = _read_table(path)
    folder = path.resolve().parent
    for section, key in _PATHS:
        table = values.get(section)
        if isinstance(table, dict):
            entries = cast(dict[str, Any], table)
            if isinstance(entries.get(key), str) and (key != "arm" or entries[key].endswith(".toml")):
                entries[key] = str((folder / entries[key]).resolve())
    return values


def _arm_named_by(source: dict[str, Any]) -> str | None:
    run = source.get("run")
    arm = cast(dict[str, Any], run).get("arm") if isinstance(run, dict) else None
    return None if arm is None else str(arm)


def shipped_arms() -> list[str]:
    """Names of the arms in this package."""
    return sorted(
        Path(entry.name).stem for entry in files("stepalign_run.config.arms").iterdir() if entry.name.endswith(".toml")
    )


def shipped_tables() -> dict[str, TableSection]:
    """The place in tables of each arm in this package."""
    return {name: _read_arm(name)[1] for name in shipped_arms()}


def _read_arm(name: str) -> tuple[dict[str, Any], TableSection]:
    """The condition that an arm's file describes, and the arm's place in tables. Raises ConfigError."""
    values = _read_arm_file(name)
    try:
        return values, TableSection.model_validate(values.pop("table", {}))
    except ValidationError as error:
        raise ConfigError(f"run.arm {name}: [table] {_explain(error)}") from None


def _read_arm_file(name: str) -> dict[str, Any]:
    """Raises ConfigError when there is none."""
    if name.endswith(".toml"):
        return _read_table(Path(name))
    if name not in shipped_arms():
        raise ConfigError(
            f"run.arm: there is no arm {name!r}; shipped are {', '.join(shipped_arms())}, and the path of a TOML file "
            "is taken too"
        )
    with as_file(files("stepalign_run.config.arms") / f"{name}.toml") as path:
        return _read_table(path)


def known_variables() -> set[str]:
    """Every environment variable that has an effect."""

    def walk(model: type[BaseModel], prefix: str) -> set[str]:
        names: set[str] = set()
        for name, info in model.model_fields.items():
            full = prefix + name.upper()
            names.add(full)
            annotation = info.annotation
            for kind in (annotation, *get_args(annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    names |= walk(kind, full + DELIMITER)
        return names

    return walk(Config, ENV_PREFIX)


def _refuse_unknown_variables(environ: dict[str, str]) -> None:
    known = known_variables()
    unknown = sorted(key for key in environ if key.upper().startswith(ENV_PREFIX) and key.upper() not in known)
    if unknown:
        raise ConfigError(
            f"unknown environment variable(s) {', '.join(unknown)}; sections and keys are joined by two underscores, "
            f"as in {ENV_PREFIX}TRAINER{DELIMITER}STEPS"
        )


def _explain(error: ValidationError) -> str:
    """Each problem with the key it is about."""
    lines: list[str] = []
    for item in error.errors():
        message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        lines.append(f"{'.'.join(map(str, item['loc'])) or 'configuration'}: {message}")
    return "; ".join(lines)
