"""Configuration: precedence, unknown keys refused everywhere, rules across fields, every shipped file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from stepalign.errors import ConfigError
from stepalign_run.config import (
    Config,
    CriticConfig,
    CriticServerSection,
    known_variables,
    load_config,
    load_critic_config,
)

REPO = Path(__file__).parents[3]
MINIMAL = """
[model]
path = "models/tiny"
[data]
train = "train.jsonl"
[critic]
backend = "program"
checker = "lab"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def test_command_line_beats_environment_beats_file(toml: Path) -> None:
    toml.write_text(MINIMAL + "[trainer]\nsteps = 1\nbatch = 2\nmicro_batch = 3\n")
    environ = {"STEPALIGN_TRAINER__STEPS": "10", "STEPALIGN_TRAINER__BATCH": "20"}
    trainer = load_config(toml, ["--trainer.steps", "100"], environ).trainer
    assert (trainer.steps, trainer.batch, trainer.micro_batch) == (100, 20, 3)


def test_a_partial_override_keeps_the_rest_of_the_section(toml: Path) -> None:
    toml.write_text(MINIMAL + "[trainer.lora]\nrank = 4\nalpha = 8\n")
    assert load_config(toml, ["--trainer.lora.rank", "2"], {}).trainer.lora.alpha == 8


def test_paths_are_relative_to_the_file(toml: Path) -> None:
    config = load_config(toml, [], {})
    assert config.data.train == (toml.parent / "train.jsonl").resolve()
    assert config.run.dir == Path("runs")


@pytest.mark.parametrize(
    ("extra", "overrides", "environ", "named"),
    [
        ("[trainer]\nstepz = 3\n", [], {}, "trainer.stepz"),
        ("[trainr]\nsteps = 3\n", [], {}, "trainr"),
        ("", ["--trainer.stepz", "3"], {}, "--trainer.stepz"),
        ("", ["stray"], {}, "stray"),
        ("", [], {"STEPALIGN_TRAINER__STEPZ": "3"}, "STEPALIGN_TRAINER__STEPZ"),
        ("", [], {"STEPALIGN_TRAINER_STEPS": "3"}, "STEPALIGN_TRAINER_STEPS"),
        ("", ["--trainer.steps", "0"], {}, "trainer.steps"),
        ("", ["--queue.capacity", "63"], {}, "at least 2 × trainer.batch"),
        ("", ["--model.dtype", "bfloat16"], {}, "solver.merge_adapter"),
        ("", ["--trainer.lora.target_modules", "lm_head"], {}, "lm_head"),
        ("", ["--critic.backend", "transformers"], {}, "critic.path"),
        (
            "",
            ["--critic.vllm.engine_args", "trust_remote_code=true"],
            {},
            "no code is loaded by configuration",
        ),
        ("[critic.vllm]\nengine_args = {max_num_seqs = 3}\n", [], {}, "max_num_seqs: set critic.max_batch"),
        ("", ["--critic.vllm.engine_args", "spec_method='ngram_gpu'"], {}, "spec_method: no speculative decoding"),
        ("[critic.openai]\nextra_body = {stream = true}\n", [], {}, "stream: an answer is read whole"),
        ("[critic.openai]\nextra_body = {model = 'm'}\n", [], {}, "model: set critic.openai.model"),
        ("", ["--critic.openai.extra_body", "max_tokens=3"], {}, "max_tokens: set critic.max_new_tokens"),
        ("[critic.openai]\nextra_body = {day = 2026-01-01}\n", [], {}, "day: JSON has no date"),
        ("[critic.openai]\nextra_body = {top = nan}\n", [], {}, "top: no finite number"),
        ("", ["--critic.openai.max_tokens_field", "messages"], {}, "'messages' is another field of every request"),
        ("", ["--critic.openai.max_tokens_field", "a b"], {}, "critic.openai.max_tokens_field"),
        ("[critic.openai]\nmax_tokens_field = 'm'\nextra_body = {m = 1}\n", [], {}, "m is max_tokens_field"),
        ("[critic.openai]\nmax_tokens_field = 'm'\nomit = ['max_tokens']\n", [], {}, "remove one of them"),
        ("", ["--critic.openai.omit", "messages"], {}, "critic.openai.omit"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(
    toml: Path, extra: str, overrides: list[str], environ: dict[str, str], named: str
) -> None:
    toml.write_text(MINIMAL + extra)
    with pytest.raises(ConfigError) as error:
        load_config(toml, overrides, environ)
    assert named in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml", [], {})
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "broken.toml", [], {})


SHIPPED = sorted((REPO / "configs").glob("*.toml"))
OF_A_CRITIC = REPO / "configs" / "critic.toml"
CRITICS = {OF_A_CRITIC, REPO / "configs" / "qwen.toml"}


@pytest.mark.parametrize("path", [path for path in SHIPPED if path not in CRITICS], ids=lambda path: path.name)
def test_every_shipped_configuration_of_a_run_loads(path: Path) -> None:
    assert isinstance(load_config(path, [], {}), Config)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_has_a_critic(path: Path) -> None:
    assert isinstance(load_critic_config(path, [], {}), CriticConfig)


def test_the_other_backends_of_the_shipped_critic_load(tmp_path: Path) -> None:
    """They stand in comments of its file."""
    text = OF_A_CRITIC.read_text(encoding="utf-8")
    _, _, commented = text.partition("these lines take the place of those above:\n")
    path = tmp_path / "critic.toml"
    path.write_text("\n".join(line.removeprefix("# ") for line in commented.splitlines()))
    critic = load_critic_config(path, [], {}).critic
    assert (critic.backend, critic.path) == ("vllm", Path("/models/critic"))


CRITIC = '[critic]\nbackend = "program"\nchecker = "lab"\n'


def critic_from(folder: Path, text: str, overrides: Sequence[str] = (), environ: dict[str, str] | None = None) -> Any:
    path = folder / "critic.toml"
    path.write_text(text)
    return load_critic_config(path, overrides, environ or {}).critic


def test_a_critic_needs_no_model_data_or_run(tmp_path: Path) -> None:
    assert critic_from(tmp_path, CRITIC, ["--critic.port", "1"]).port == 1


def test_a_critic_passes_over_the_rest_of_a_run(tmp_path: Path) -> None:
    text = CRITIC + 'url = "http://127.0.0.1:9"\n[model]\nnothing = "valid"\n[trainer]\nsteps = 0\n'
    options = ["--run.dir", "/nowhere", "--run.arm", "nobody's", "--critic.concurrency", "0", "--critic.max_batch", "2"]
    environ = {
        "STEPALIGN_RUN__NAME": "not a name",
        "STEPALIGN_CRITIC__URL": "http://127.0.0.1:9",
        "STEPALIGN_CRITIC__MAX_QUEUE": "3",
    }
    critic = critic_from(tmp_path, text, options, environ)
    assert (critic.max_batch, critic.max_queue, critic.checker) == (2, 3, "lab")
    assert "url" not in critic.model_dump()


@pytest.mark.parametrize(
    ("extra", "overrides", "environ", "named"),
    [
        ("[trainr]\n", [], {}, "trainr: unknown key"),
        ("maximum = 3\n", [], {}, "critic.maximum: unknown key"),
        ("", ["--critic.maximum", "3"], {}, "command line: unrecognized arguments: --critic.maximum"),
        ("", ["--trainer.stepz", "3"], {}, "command line: unrecognized arguments: --trainer.stepz"),
        ("", ["--critic.port", "-1"], {}, "command line: critic.port"),
        ("", [], {"STEPALIGN_CRITIC__PROT": "3"}, "STEPALIGN_CRITIC__PROT"),
        ("", ["--critic.backend", "transformers"], {}, "needs critic.path"),
        ("", ["--critic.backend", "openai"], {}, "needs critic.openai.base_url"),
    ],
)
def test_a_critic_refuses_by_name(
    tmp_path: Path, extra: str, overrides: list[str], environ: dict[str, str], named: str
) -> None:
    with pytest.raises(ConfigError) as error:
        critic_from(tmp_path, CRITIC + extra, overrides, environ)
    assert named in str(error.value)


def test_a_run_with_the_url_of_a_critic_needs_no_backend(toml: Path) -> None:
    """A critic that takes the same settings does."""
    critic = ["--critic.url", "http://127.0.0.1:9", "--critic.backend", "transformers"]
    assert load_config(toml, critic, {}).critic.path is None
    with pytest.raises(ConfigError, match=r"needs critic\.path"):
        load_critic_config(toml, critic, {})


def test_a_report_holds_no_address(toml: Path) -> None:
    addresses = ["--critic.url", "http://127.0.0.1:9", "--critic.address_file", "critic.url"]
    assert load_config(toml, addresses, {}).as_report() == load_config(toml, [], {}).as_report()


def without_a_sentence(model: type[BaseModel], prefix: str = "") -> list[str]:
    bare: list[str] = []
    for name, info in model.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            bare += without_a_sentence(section, f"{prefix}{name}.")
        elif not info.description:
            bare.append(prefix + name)
    return bare


def test_every_field_has_a_sentence() -> None:
    assert without_a_sentence(Config) == []


def test_nested_variables_are_known() -> None:
    assert {"STEPALIGN_TRAINER__LORA__RANK", "STEPALIGN_QUEUE__REDIS_URL"} <= known_variables()


def test_the_papers_setting_is_the_papers() -> None:
    """Hyperparameters of arXiv 2606.11173."""
    config = load_config(REPO / "configs" / "paper.toml", [], {})
    trainer, solver, model = config.trainer, config.solver, config.model
    assert (config.arm_name, config.arm.context, config.arm.scope) == ("stepalign", "critique", "full")
    assert config.arm.objective == "forward_kl"
    assert (trainer.lora.rank, trainer.lora.alpha) == (64, 128)
    projections = ("q", "k", "v", "o", "gate", "up", "down")
    assert set(trainer.lora.target_modules) == {f"{name}_proj" for name in projections}
    assert (trainer.learning_rate, trainer.batch, trainer.steps) == (5e-6, 32, 70)
    assert (solver.temperature, solver.max_new_tokens, solver.top_p, solver.top_k) == (1.1, 2048, 1.0, 0)
    assert (config.evaluation.every, config.evaluation.samples) == (10, 12)
    assert {model.dtype, config.critic.dtype} == {"bfloat16"} and solver.merge_adapter is False
    assert model.chat_template_options == {"enable_thinking": False}
    assert model.teacher_chat_template_options == {"enable_thinking": True}
    assert (config.critic.backend, config.critic.max_batch) == ("vllm", config.trainer.batch)
    # Trained on, picked by, and reported on: three lists of problems.
    assert len({config.data.train, config.data.validation, config.data.test, None}) == 4


def graders(path: Path, *overrides: str, environ: dict[str, str] | None = None) -> tuple[str, str, str]:
    """Of the run, of its critic as the run reads it, and of its critic as ``stepalign critic`` reads the same file."""
    config = load_config(path, overrides, environ or {})
    return config.data.grader, config.critic.grader, load_critic_config(path, overrides, environ or {}).critic.grader


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("math", "math", "math")),
        (["--model.prompts", "chat-v2"], ("math", "math", "math")),
        (["--model.prompts", "lab-v1"], ("exact", "exact", "exact")),
        (["--model.prompts", "lab-v1", "--critic.prompts", "chat-v1"], ("exact", "exact", "exact")),
        (["--data.grader", "exact"], ("exact", "exact", "exact")),
        (["--data.grader", "odd"], ("odd", "odd", "odd")),
        (["--data.grader", "auto"], ("math", "math", "math")),
        (["--critic.grader", "exact"], ("math", "exact", "exact")),
        (["--critic.grader", "odd", "--data.grader", "even"], ("even", "odd", "odd")),
    ],
)
def test_a_run_has_one_grader_by_its_prompts_unless_it_names_another(
    toml: Path, overrides: list[str], expected: tuple[str, str, str]
) -> None:
    assert graders(toml, *overrides) == expected


def test_the_environment_names_a_grader_too(toml: Path) -> None:
    assert graders(toml, environ={"STEPALIGN_DATA__GRADER": "exact"}) == ("exact", "exact", "exact")
    assert graders(toml, environ={"STEPALIGN_CRITIC__GRADER": "exact"}) == ("math", "exact", "exact")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lab", "exact"), ("sums", "exact"), ("paper", "math"), ("smollm2", "math")],
)
def test_the_shipped_runs_have_the_grader_of_their_prompts(name: str, expected: str) -> None:
    assert graders(REPO / "configs" / f"{name}.toml") == (expected,) * 3


def test_a_critic_alone_has_the_grader_of_its_prompts(tmp_path: Path) -> None:
    path = tmp_path / "critic.toml"
    for prompts, expected in (("chat-v1", "math"), ("lab-v1", "exact")):
        path.write_text(f'[critic]\nbackend = "program"\nchecker = "lab"\nprompts = "{prompts}"\n')
        assert load_critic_config(path, [], {}).critic.grader == expected
        assert load_critic_config(path, ["--critic.grader", "odd"], {}).critic.grader == "odd"


def test_a_critique_and_a_report_depend_on_the_grader_by_its_name(toml: Path) -> None:
    section = CriticServerSection(backend="program", checker="lab")
    assert section.shaping()["grader"] == "math"
    assert CriticServerSection(backend="program", checker="lab", grader="exact").shaping() != section.shaping()
    assert load_config(toml, [], {}).as_report()["data"]["grader"] == "math"


@pytest.mark.parametrize("section", ["data", "critic", "model"])
def test_a_section_that_is_no_table_is_refused_and_not_read(tmp_path: Path, section: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"{section} = 3\n" + MINIMAL.replace(f"[{section}]", "[run]"))
    with pytest.raises(ConfigError, match=section):
        load_config(path, [], {})
