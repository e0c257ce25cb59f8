"""Arms as files: found by name or path, overridden key by key, and nothing in them without an effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepalign.errors import ConfigError
from stepalign_run.config import Config, load_config, shipped_arms, shipped_tables

ARMS = Path(__file__).parents[3] / "configs" / "arms"
FILES = sorted(ARMS.glob("*.toml"))
MINIMAL = """
[model]
path = "models/tiny"
[data]
train = "train.jsonl"
[critic]
backend = "program"
checker = "lab"
"""
GRPO = ("--arm.objective", "grpo", "--arm.context", "null", "--arm.scope", "full", "--arm.group_size", "8")


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def load(toml: Path, *overrides: str, environ: dict[str, str] | None = None) -> Config:
    return load_config(toml, overrides, environ or {})


def test_the_folder_of_arms_holds_what_the_package_ships() -> None:
    assert [path.stem for path in FILES] == shipped_arms()
    assert {"stepalign_scoped", "stepalign", "refsol", "grpo", "null"} <= set(shipped_arms())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_arm_is_the_same_by_its_name_and_by_its_path(toml: Path, path: Path) -> None:
    by_name, by_path = load(toml, "--run.arm", path.stem), load(toml, "--run.arm", str(path))
    assert by_name.arm == by_path.arm
    assert (by_name.arm_name, by_path.arm_name) == (path.stem, path.stem)


def test_no_two_shipped_arms_are_the_same(toml: Path) -> None:
    sections = {load(toml, "--run.arm", name).arm.model_dump_json() for name in shipped_arms()}
    assert len(sections) == len(shipped_arms())


def test_each_shipped_arm_has_its_own_rank_and_shipped_comparands() -> None:
    tables = shipped_tables()
    assert list(tables) == shipped_arms()
    assert len({table.rank for table in tables.values()}) == len(tables)
    pairs = [
        frozenset((arm, other))
        for arm, table in tables.items()
        for named in table.against.model_dump().values()
        for other in named
    ]
    assert len(set(pairs)) == len(pairs) and all(len(pair) == 2 and pair <= set(tables) for pair in pairs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_place_in_tables_is_no_part_of_the_condition(toml: Path, path: Path) -> None:
    assert "[table]" in path.read_text()
    config = load(toml, "--run.arm", path.stem)
    assert config.arm.model_dump().keys() == {
        *("objective", "context", "scope", "group_size", "grpo", "fixed_negative")
    }
    assert config.as_report()["arm"] == config.arm.model_dump(mode="json")


def test_without_a_name_the_arm_is_the_scoped_one(toml: Path) -> None:
    assert load(toml).arm == load(toml, "--run.arm", "stepalign_scoped").arm
    assert (load(toml).arm.context, load(toml).arm.scope) == ("critique", "through_first_error")


def test_the_path_of_an_arm_in_a_file_is_relative_to_that_files_folder(toml: Path, tmp_path: Path) -> None:
    (tmp_path / "arms").mkdir()
    (tmp_path / "arms" / "mine.toml").write_text('context = "reference"\ngroup_size = 4\n')
    toml.write_text(MINIMAL + '[run]\narm = "arms/mine.toml"\n')
    config = load(toml)
    assert (config.arm.context, config.arm.group_size, config.arm_name) == ("reference", 4, "mine")


def test_an_arms_path_on_the_command_line_starts_at_the_working_directory(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.toml").write_text('context = "omission"\n')
    monkeypatch.chdir(elsewhere)
    assert load(toml, "--run.arm", "mine.toml").arm.context == "omission"
    assert load(toml, environ={"STEPALIGN_RUN__ARM": "mine.toml"}).arm.context == "omission"


def test_command_line_beats_environment_beats_file_beats_arm(toml: Path, tmp_path: Path) -> None:
    arm = tmp_path / "mine.toml"
    arm.write_text(
        'objective = "grpo"\ngroup_size = 2\n'
        '[grpo]\nbeta = 0.1\nnormalisation = "sequence"\nscale_rewards = false\nnum_iterations = 2\n'
    )
    toml.write_text(MINIMAL + '[run]\narm = "mine.toml"\n[arm]\ngroup_size = 4\n[arm.grpo]\nbeta = 0.2\n')
    environ = {
        "STEPALIGN_ARM__GROUP_SIZE": "8",
        "STEPALIGN_ARM__GRPO__BETA": "0.3",
        "STEPALIGN_ARM__GRPO__EPSILON": "0.3",
    }
    found = load(toml, "--arm.group_size", "16", environ=environ).arm
    assert (found.objective, found.group_size) == ("grpo", 16)
    assert (found.grpo.beta, found.grpo.epsilon) == (0.3, 0.3)
    assert (found.grpo.normalisation, found.grpo.scale_rewards, found.grpo.num_iterations) == ("sequence", False, 2)
    assert load(toml).arm.group_size == 4 and load(toml).arm.grpo.beta == 0.2


def test_the_name_of_the_arm_has_the_same_precedence(toml: Path) -> None:
    toml.write_text(MINIMAL + '[run]\narm = "refsol"\n')
    environ = {"STEPALIGN_RUN__ARM": "null"}
    assert load(toml).arm.context == "reference"
    assert load(toml, environ=environ).arm.context == "null"
    assert load(toml, "--run.arm", "omission", environ=environ).arm.context == "omission"


def test_an_unknown_name_is_refused_with_the_names_there_are(toml: Path) -> None:
    with pytest.raises(ConfigError, match=r"no arm 'stepaling'.*shipped are .*stepalign_scoped.*path of a TOML file"):
        load(toml, "--run.arm", "stepaling")


def test_a_missing_or_broken_arm_file_is_named(toml: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: there is no such file"):
        load(toml, "--run.arm", str(tmp_path / "none.toml"))
    (tmp_path / "broken.toml").write_text("context =\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load(toml, "--run.arm", str(tmp_path / "broken.toml"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("contex = 'critique'\n", "arm.contex: unknown key"),
        ("[grpo]\nbata = 1.0\n", "arm.grpo.bata: unknown key"),
        ("context = 'hint'\n", "arm.context"),
        ("[arm]\ncontext = 'critique'\n", "arm.arm: unknown key"),
        ("[table]\nrnk = 3\n", "[table]: rnk: unknown key"),
        ("[table]\nrank = 0\n", "[table]: rank"),
        ("[table]\nagainst = ['grpo']\n", "[table]: against"),
        ("[table.against]\npapre = ['grpo']\n", "[table]: against.papre: unknown key"),
    ],
)
def test_what_is_wrong_in_an_arm_file_is_named_with_the_file(
    toml: Path, tmp_path: Path, content: str, named: str
) -> None:
    arm = tmp_path / "mine.toml"
    arm.write_text(content)
    with pytest.raises(ConfigError) as error:
        load(toml, "--run.arm", str(arm))
    assert named in str(error.value) and str(arm) in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--arm.grpo.beta", "0.1"], "arm.grpo has no effect with objective 'forward_kl'"),
        (["--arm.fixed_negative.advantage", "-2"], "arm.fixed_negative has no effect with objective 'forward_kl'"),
        ([*GRPO, "--arm.fixed_negative.advantage", "-2"], "arm.fixed_negative has no effect with objective 'grpo'"),
        (["--run.arm", "refsol", "--arm.scope", "through_first_error"], "scope 'through_first_error' needs a critique"),
        (["--run.arm", "null", "--arm.scope", "random_step"], "scope 'random_step' needs a critique"),
        (["--arm.group_size", "5"], "it must be a multiple of arm.group_size = 5"),
        ([*GRPO, "--trainer.batch", "20"], "it must be a multiple of arm.group_size = 8"),
        ([*GRPO, "--arm.group_size", "1"], "arm.group_size must be at least 2"),
        ([*GRPO, "--arm.grpo.epsilon", "0.1"], "num_iterations = 1 nothing is clipped"),
        ([*GRPO, "--arm.grpo.epsilon_high", "0.28"], "num_iterations = 1 nothing is clipped"),
        ([*GRPO, "--arm.context", "critique"], "objective 'grpo' has no teacher; remove context 'critique'"),
        (["--run.arm", "fixed_negative", "--arm.context", "reference"], "objective 'fixed_negative' has no teacher"),
    ],
)
def test_a_key_that_would_have_no_effect_is_refused(toml: Path, overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(toml, *overrides)
    assert named in str(error.value)


def test_clipping_may_be_set_once_there_is_more_than_one_iteration(toml: Path) -> None:
    clipping = ("--arm.grpo.num_iterations", "2", "--arm.grpo.epsilon", "0.1", "--arm.grpo.epsilon_high", "0.3")
    assert load(toml, *GRPO, *clipping).arm.grpo.epsilon_high == 0.3


@pytest.mark.parametrize(("section", "value"), [("run", "3"), ("arm", "3"), ("run", "[1]")])
def test_a_value_in_the_place_of_a_section_is_named(toml: Path, section: str, value: str) -> None:
    toml.write_text(f"{section} = {value}\n{MINIMAL}")
    with pytest.raises(ConfigError, match=section):
        load(toml)
