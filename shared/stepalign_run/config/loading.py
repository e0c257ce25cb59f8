"""Reading of configurations: a TOML file, overridable by environment and command line.

Precedence, highest first: command line (``--trainer.steps 50``), environment (``STEPALIGN_TRAINER__STEPS=50``), the
file. Unknown keys are refused in all three. Paths of models and problems in the file are relative to the file's folder
(a link is followed first); ``run.dir`` and paths from the command line or the environment to the working directory.

The processes of a run share one file. A critic is no run: of a run's file it reads the settings of its own side alone.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsConfigDict, SettingsError

from stepalign.errors import ConfigError
from stepalign_run.config.arm import TableSection
from stepalign_run.config.base import DELIMITER, ENV_PREFIX
from stepalign_run.config.critic import CriticClientSection, CriticConfig
from stepalign_run.config.graders import with_run_graders
from stepalign_run.config.run import Config, RunSection

_PATHS = (
    ("run", "arm"),
    ("model", "path"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
    ("critic", "path"),
)

Values = dict[str, Any]
"""Values by section and key, not validated."""


def load_config(path: Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Config:
    """Read a run's file with overrides such as ``["--trainer.steps", "50"]``.

    Raises ConfigError with a message that names every unknown or invalid key.
    """
    given, problems = _read_sources(path, overrides, environ)
    arm = next((arm for values in given if (arm := _arm_named_by(values)) is not None), None)
    of_arm, _ = _read_arm(RunSection().arm if arm is None else _checked_arm(arm))
    try:
        config = Config.model_validate(_merge([*given, {"arm": of_arm}]))
    except ValidationError as error:
        about_the_arm = arm is not None and any(item["loc"][:1] == ("arm",) for item in error.errors())
        file = f"{path} with run.arm {arm}" if about_the_arm else str(path)
        raise _refusal(Config, error, file, overrides, problems) from None
    _refuse(problems)
    return config


def load_critic_config(
    path: Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> CriticConfig:
    """Read a critic's file, or the critic's side of a run's, with overrides such as ``["--critic.port", "8300"]``.

    The run's other sections and the client's keys are passed over, in the environment and on the command line too.
    Raises ConfigError with a message that names every unknown key, and every invalid one of the critic's.
    """
    sources, problems = _read_sources(path, overrides, environ)
    given = _merge(sources)
    # The run's sections go, and with them how the run judges answers, which is how its critic does.
    of_a_run = not given.keys().isdisjoint({"model", "data"})
    try:
        config = CriticConfig.model_validate(_of_the_critic(with_run_graders(given) if of_a_run else given))
    except ValidationError as error:
        raise _refusal(CriticConfig, error, str(path), overrides, problems) from None
    _refuse(problems)
    return config


def _of_the_critic(values: Values) -> Values:
    """The critic's side of a run's values. Unknown sections and keys stay, to be refused."""
    own = CriticConfig.model_fields
    kept = {name: value for name, value in values.items() if name in own or name not in Config.model_fields}
    section = kept.get("critic")
    if isinstance(section, dict):
        table = cast(Values, section)
        kept["critic"] = {key: value for key, value in table.items() if key not in CriticClientSection.model_fields}
    return kept


class _Options(Config, BaseSettings):
    """Gives the sources the names and kinds of a run's options and variables. It has no instances."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=DELIMITER,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_prog_name="stepalign",
    )


class _Environment(EnvSettingsSource):
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        super().__init__(_Options)

    def _load_env_vars(self) -> dict[str, str | None]:
        return {key.lower(): value for key, value in self._environ.items()}


def _read_sources(
    path: Path, overrides: Sequence[str], environ: Mapping[str, str] | None
) -> tuple[list[Values], list[str]]:
    """The values of the command line, of the environment and of the file, none of them validated.

    And what is wrong with the names in the environment, to be told with what is wrong in the file. Options that cannot
    be read raise ConfigError at once: what they would have set is not known.
    """
    values = _read_toml(path)
    environ = os.environ if environ is None else environ
    problems = _unknown_variables(environ)
    try:
        command_line = CliSettingsSource[Any](_Options, cli_parse_args=list(overrides))()
    except SettingsError as error:
        said = str(error).removeprefix("error parsing CLI: ")
        raise ConfigError("; ".join([*problems, f"command line: {said}{_nearest_options(said)}"])) from None
    return [command_line, _Environment(environ)(), values], problems


def _nearest_options(said: str) -> str:
    """What the options that are unrecognised might have been meant to be."""
    known = [name.removeprefix(ENV_PREFIX).replace(DELIMITER, ".").lower() for name in known_variables()]
    named = [word.partition("=")[0].removeprefix("--") for word in said.split() if word.startswith("--")]
    return "".join(_nearest(name, known, "--") for name in named if name not in known)


def _nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """The known name that is most like an unknown one, as the end of a message; empty where none is."""
    found = get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def _merge(sources: Iterable[Values]) -> Values:
    """One table of several. What two of them give is taken from the first."""
    merged: Values = {}
    for source in sources:
        for key, value in source.items():
            known = merged.get(key)
            if isinstance(known, dict) and isinstance(value, dict):
                merged[key] = _merge([cast(Values, known), cast(Values, value)])
            else:
                merged.setdefault(key, value)
    return merged


def _read_table(path: Path) -> Values:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a TOML file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _read_toml(path: Path) -> Values:
    values = _read_table(path)
    folder = path.resolve().parent
    for section, key in _PATHS:
        table = values.get(section)
        if isinstance(table, dict):
            entries = cast(Values, table)
            if isinstance(entries.get(key), str) and (key != "arm" or entries[key].endswith(".toml")):
                entries[key] = _resolved(folder / entries[key])
    return values


def _resolved(path: Path) -> str:
    """The path with its links followed, or as it is where that cannot be done: the file will not open either."""
    try:
        return str(path.resolve())
    except (OSError, RuntimeError, ValueError):
        return str(path)


def _arm_named_by(source: Values) -> str | None:
    run = source.get("run")
    arm = cast(Values, run).get("arm") if isinstance(run, dict) else None
    return None if arm is None else str(arm)


def _checked_arm(arm: str) -> str:
    """Raises ConfigError for a name or a path that is none."""
    try:
        return RunSection(arm=arm).arm
    except ValidationError as error:
        raise ConfigError(f"run.arm: {_message(error.errors()[0])}") from None


def shipped_arms() -> list[str]:
    """Names of the arms in this package."""
    return sorted(
        Path(entry.name).stem for entry in files("stepalign_run.config.arms").iterdir() if entry.name.endswith(".toml")
    )


def shipped_tables() -> dict[str, TableSection]:
    """The place in tables of each arm in this package."""
    return {name: _read_arm(name)[1] for name in shipped_arms()}


def _read_arm(name: str) -> tuple[Values, TableSection]:
    """The condition that an arm's file describes, and the arm's place in tables. Raises ConfigError."""
    values = _read_arm_file(name)
    try:
        return values, TableSection.model_validate(values.pop("table", {}))
    except ValidationError as error:
        raise _refusal(TableSection, error, f"run.arm {name}, [table]", ()) from None


def _read_arm_file(name: str) -> Values:
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


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    known = known_variables()
    unknown = sorted(key for key in environ if key.upper().startswith(ENV_PREFIX) and key.upper() not in known)
    if not unknown:
        return []
    nearest = "".join(_nearest(key.upper(), known) for key in unknown)
    return [
        f"unknown environment variable(s) {', '.join(unknown)}{nearest}; sections and keys are joined by two "
        f"underscores, as in {ENV_PREFIX}TRAINER{DELIMITER}STEPS"
    ]


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("; ".join(problems))


def _refusal(
    model: type[BaseModel],
    error: ValidationError,
    file: str,
    overrides: Sequence[str],
    problems: Sequence[str] = (),
) -> ConfigError:
    """Each problem of ``model`` with the key that it is about, and the command line or the file as its source.

    ``problems`` of other sources stand before them.
    """
    options = {option.partition("=")[0] for option in overrides}
    keys = {f"--{'.'.join(map(str, item['loc']))}" for item in error.errors()}
    found = [
        f"{'.'.join(map(str, item['loc'])) or 'configuration'}: {_message(item)}{_nearest_key(model, item)}"
        for item in error.errors()
    ]
    source = "command line" if keys <= options else file
    return ConfigError("; ".join([*problems, f"{source}: {'; '.join(found)}"]))


def _nearest_key(model: type[BaseModel], item: ErrorDetails) -> str:
    """What an unknown key might have been meant to be: a key of the same table."""
    if item["type"] != "extra_forbidden":
        return ""
    *tables, key = map(str, item["loc"])
    for table in tables:
        annotation = model.model_fields[table].annotation
        sections = [
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not sections:
            return ""
        model = sections[0]
    return _nearest(key, list(model.model_fields))


def _message(item: ErrorDetails) -> str:
    return "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
