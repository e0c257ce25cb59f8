"""Configuration of a run: one TOML file for every process, overridable by environment and command line.

Precedence, highest first: command line (``--trainer.steps 50``), environment (``STEPALIGN_TRAINER__STEPS=50``), the
file. Unknown keys are refused in all three. Paths of models and problems in the file are relative to the file's folder
(a link is followed first); ``run.dir`` and paths from the command line or the environment to the working directory.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from stepalign.errors import ConfigError
from stepalign.types import CRITIQUE_CONTEXTS, ContextKind, SamplingParameters

ENV_PREFIX = "STEPALIGN_"
_DELIMITER = "__"
DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?|xpu(:\d+)?)$"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=100)] = "run"
    """Name of the run; its files go to ``dir/name`` and its Redis keys under its name."""
    dir: Path = Path("runs")
    """Folder of all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of problem order, sampling and adapter initialisation."""
    arm: Annotated[str, Field(pattern=r"^([a-z0-9_]+|.+\.toml)$")] = "stepalign_scoped"
    """The experimental condition: one of the arms that are shipped (configs/arms), or the path of an arm's file."""
    heartbeat_file: Path | None = None
    """A file that solver, trainer and evaluation touch while they work, for a health check in a container."""


class GrpoSection(Section):
    """Group-relative policy optimisation. Names are those of TRL's ``GRPOConfig`` where it has them."""

    scale_rewards: bool = True
    """Divide the advantages of a group by the standard deviation of its rewards."""
    normalisation: Literal["token", "sequence"] = "token"
    """``token``: every token of the batch weighs the same. ``sequence``: every rollout does."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The probability ratio is clipped below 1 − epsilon."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """The ratio is clipped above 1 + epsilon_high (clip-higher); unset, it is ``epsilon``."""
    num_iterations: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps on the same batch. With one, the ratio is 1 and nothing is clipped."""
    beta: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL of the student to the base, over the full vocabulary."""
    reward_needs_eos: bool = True
    """A right answer is rewarded only where the rollout ended by EOS."""


class FixedNegativeSection(Section):
    """One fixed negative advantage on tokens that the student finds unlikely (2608.31046)."""

    advantage: Annotated[float, Field(lt=0)] = -1.0
    """The advantage of those tokens."""
    max_probability: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Tokens whose probability under the student is below this."""


class ArmSection(Section):
    """What makes an experimental condition. The file that ``run.arm`` names holds these keys at its top level."""

    objective: Literal["forward_kl", "grpo", "fixed_negative"] = "forward_kl"
    """``forward_kl``: self-distillation. ``grpo``: reward on the final answer. ``fixed_negative``: no teacher."""
    context: ContextKind = ContextKind.NULL
    """What the self-teacher sees besides the question."""
    scope: Literal["full", "through_first_error", "random_step"] = "full"
    """The tokens that carry the loss."""
    group_size: Annotated[int, Field(ge=1)] = 1
    """Rollouts of the same problem, which are admitted to the queue together."""
    grpo: GrpoSection = GrpoSection()
    fixed_negative: FixedNegativeSection = FixedNegativeSection()

    @property
    def needs_critic(self) -> bool:
        return self.context in CRITIQUE_CONTEXTS

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> ArmSection:
        for name, untouched in (("grpo", GrpoSection()), ("fixed_negative", FixedNegativeSection())):
            if self.objective != name and getattr(self, name) != untouched:
                raise ValueError(f"arm.{name} has no effect with objective {self.objective!r}; remove it")
        if self.objective != "forward_kl" and self.context is not ContextKind.NULL:
            raise ValueError(f"objective {self.objective!r} has no teacher; remove context {self.context.value!r}")
        if self.scope != "full" and not self.needs_critic:
            raise ValueError(f"scope {self.scope!r} needs a critique, which context {self.context.value!r} has not")
        if self.objective == "grpo" and self.group_size < 2:
            raise ValueError("objective 'grpo' compares rollouts of a problem: arm.group_size must be at least 2")
        unclipped = GrpoSection()
        clips = (self.grpo.epsilon, self.grpo.epsilon_high) != (unclipped.epsilon, unclipped.epsilon_high)
        if self.grpo.num_iterations == 1 and clips:
            raise ValueError("with grpo.num_iterations = 1 nothing is clipped; remove epsilon and epsilon_high")
        return self


class ModelSection(Section):
    path: Path
    """Folder of the solver model: safetensors, tokenizer, config.json."""
    prompts: str = "chat-v1"
    """Prompt set of the student and the teacher."""
    device: Annotated[str, Field(pattern=DEVICE)] = "auto"
    """A torch device, or ``auto``: CUDA, then MPS, then CPU."""
    dtype: Dtype = Dtype.FLOAT32
    """Number format of the weights."""
    chat_template_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the chat template for the student, such as ``enable_thinking = false``."""
    teacher_chat_template_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the chat template for the teacher, whatever it sees; empty, they are the student's."""


class DataSection(Section):
    train: Path
    """Problems to train on (JSONL)."""
    validation: Path | None = None
    """Problems that pick the checkpoint (JSONL)."""
    test: Path | None = None
    """Problems of the reported figures (JSONL)."""
    grader: str = "exact"
    """What compares answers: a name in the entry-point group ``stepalign.graders``. ``exact``: numbers, else text."""
    checker: str | None = None
    """An exact checker of these problems, a name in the group ``stepalign.checkers``. It serves figures only: the share
    of traces in which every step is right, and where the first error is in arms without a critic."""
    answer_choices: Annotated[int, Field(ge=2)] | None = None
    """How many answers a guesser chooses from; the report then shows what chance gives."""


class QueueSection(Section):
    redis_url: str | None = None
    """A Redis (≥ 7.0) or Valkey server. Unset, ``stepalign run`` starts the embedded one."""
    redis_password_file: Path | None = None
    """A file that holds the server's password, for a ``redis_url`` without one."""
    reconnect_seconds: Annotated[float, Field(ge=0)] = 3.0
    """About how long a command is tried again while the server does not answer, as when it restarts."""
    capacity: Annotated[int, Field(ge=1)] = 256
    """Most rollouts in the queue, claimed ones included; a producer waits above it."""
    claim_idle_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A claimed rollout whose consumer gave no sign of life for so long goes to another consumer."""
    max_deliveries: Annotated[int, Field(ge=1)] = 5
    """Deliveries after which a rollout goes to the dead letters."""
    max_entry_bytes: Annotated[int, Field(ge=1024)] = 4 * 2**20
    """Largest encoded rollout."""


class OpenAISection(Section):
    """The server that the critic's backend ``openai`` asks."""

    base_url: str | None = None
    """Its address, version included: ``http://127.0.0.1:8000/v1``."""
    model: str | None = None
    """The served model; unset, the server must serve exactly one."""
    revision: str = "unversioned"
    """What every critique names as its weights' revision, which no such server tells. Change it with the weights."""
    api_key_file: Path | None = None
    """A file that holds the server's API key."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long the server may take for one answer, and to come up."""


_OWN_ENGINE_ARGS = {
    "model": "set critic.path",
    "tokenizer": "set critic.path, whose folder holds the tokenizer",
    "dtype": "set critic.dtype",
    "max_model_len": "set critic.max_prompt_tokens and critic.max_new_tokens",
    "max_num_seqs": "set critic.max_batch",
    "gpu_memory_utilization": "set critic.vllm.gpu_memory_utilization",
    "tensor_parallel_size": "set critic.vllm.tensor_parallel_size",
    "enable_prefix_caching": "it is always on",
    "load_format": "only safetensors are loaded",
    **dict.fromkeys(
        ("speculative_config", "hf_config_path", "hf_overrides", "tokenizer_mode", "tokenizer_revision"),
        "what makes the critic is the folder critic.path alone",
    ),
    **dict.fromkeys(
        ("trust_remote_code", "worker_cls", "worker_extension_cls", "scheduler_cls", "logits_processors"),
        "no code is loaded by configuration",
    ),
}


class VllmSection(Section):
    """The engine of the critic's backend ``vllm``."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory for weights and cache; vLLM's CPU build takes it as a share of the machine's."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share one model."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's ``AsyncEngineArgs``, such as ``{kv_cache_dtype = "fp8"}``. What has a field of its
    own, and what would load other files than the model's safetensors or run their code, is refused."""

    @field_validator("engine_args")
    @classmethod
    def _only_further_ones(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        refused = sorted(arguments.keys() & _OWN_ENGINE_ARGS.keys())
        if refused:
            raise ValueError("; ".join(f"{name}: {_OWN_ENGINE_ARGS[name]}" for name in refused))
        return arguments


class CriticSection(Section):
    url: str | None = None
    """Address of a critic service or load balancer. Unset, ``stepalign run`` starts a critic."""
    backend: Literal["transformers", "vllm", "openai", "program"] = "transformers"
    """``transformers`` and ``vllm``: a frozen language model in the process. ``openai``: one behind an
    OpenAI-compatible server. ``program``: an exact checker."""
    path: Path | None = None
    """Folder of the critic model (backends ``transformers`` and ``vllm``)."""
    checker: str | None = None
    """Name in the entry-point group ``stepalign.checkers`` (backend ``program``)."""
    prompts: str = "chat-v1"
    """Prompt set of the critic."""
    chat_template_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the critic's chat template."""
    device: Annotated[str, Field(pattern=DEVICE)] = "auto"
    """A torch device, or ``auto``: CUDA, then MPS, then CPU."""
    dtype: Dtype = Dtype.FLOAT32
    """Number format of the weights."""
    host: str = "127.0.0.1"
    """Address to listen on. Without ``api_keys_file`` only loopback addresses are accepted."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8300
    """Port to listen on; 0 takes a free one."""
    api_keys_file: Path | None = None
    """The API keys that the service accepts, one a line. With it every path but health needs one."""
    metrics_host: str = "127.0.0.1"
    """Address of ``/metrics`` when there are API keys. No key is asked for there: keep it inside."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 8301
    """Port of ``/metrics`` when there are API keys; without them it is on ``port``. 0 takes a free one."""
    drain_grace_seconds: Annotated[float, Field(ge=0)] = 0.0
    """How long requests are still served after SIGTERM, while readiness says 503 and load balancers look away."""
    finish_seconds: Annotated[float, Field(ge=0)] = 120.0
    """How long what is being answered after the grace may take to be finished; new requests are refused meanwhile."""
    api_key_file: Path | None = None
    """A file that holds the API key which the trainer sends."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 128 * 1024
    """Largest body of a request that the service takes. A load balancer repeats only what fits its buffer: raise
    ``tune.bufsize`` of services/lb/haproxy.cfg with it."""
    max_batch_items: Annotated[int, Field(ge=1)] = 64
    """Most critiques that one request may ask for. The whole of it must fit ``max_body_bytes``."""
    max_steps: Annotated[int, Field(ge=1)] = 1000
    """An attempt of more steps is refused."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 8192
    """A longer prompt is refused, never cut."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 4096
    """Budget of the critique; a critique that needs more is refused as truncated."""
    max_batch: Annotated[int, Field(ge=1)] = 32
    """Most requests generated together."""
    max_queue: Annotated[int, Field(ge=1)] = 256
    """Most requests waiting; above it the service answers 503 with Retry-After."""
    batch_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 5.0
    """How long a first request waits for others to be generated with it."""
    cache_entries: Annotated[int, Field(ge=0)] = 1024
    """Answers kept in the process. Equal requests at the same time share one generation. 0, and without
    ``cache_redis_url``: every answer is made anew."""
    cache_redis_url: str | None = None
    """A Redis server, of its own and with ``allkeys-lru``, through which replicas share answers. Unset, the
    environment's REDIS_CACHE_URL."""
    cache_redis_password_file: Path | None = None
    """A file that holds that server's password."""
    cache_ttl_seconds: Annotated[int, Field(ge=1)] = 7 * 24 * 3600
    """How long an answer stays in that server."""
    rate_limit_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Critiques a minute that each API key may ask one process for; more are answered with 429."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long the trainer waits for one critique."""
    concurrency: Annotated[int, Field(ge=1)] = 32
    """Most critiques that the trainer requests at once."""
    openai: OpenAISection = OpenAISection()
    vllm: VllmSection = VllmSection()

    def shaping(self) -> dict[str, Any]:
        """What a critique depends on, but for the critic's weights."""
        decisive = {"backend", "checker", "prompts", "chat_template_options", "dtype"}
        of_backend = {"openai": {"openai": {"base_url", "model", "revision"}}, "vllm": {"vllm": {"engine_args"}}}
        served = of_backend.get(self.backend, {})
        included = dict.fromkeys([*decisive, "max_prompt_tokens", "max_new_tokens"], True)
        return self.model_dump(mode="json", include={**included, **served})

    @model_validator(mode="after")
    def _backend_is_complete(self) -> CriticSection:
        if self.url is None and self.backend in ("transformers", "vllm") and self.path is None:
            raise ValueError(f"backend {self.backend!r} needs critic.path, the folder of the critic model")
        if self.url is None and self.backend == "openai" and self.openai.base_url is None:
            raise ValueError("backend 'openai' needs critic.openai.base_url, such as http://127.0.0.1:8000/v1")
        for name, untouched in (("openai", OpenAISection()), ("vllm", VllmSection())):
            if self.backend != name and getattr(self, name) != untouched:
                raise ValueError(f"critic.{name} has no effect with backend {self.backend!r}; remove it")
        if self.url is None and self.backend == "program" and self.checker is None:
            raise ValueError("backend 'program' needs critic.checker, a name in the group stepalign.checkers")
        return self


class SamplingSection(Section):
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.1
    """Sampling temperature. The loss does not divide logits by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus; 1 is off."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Most likely tokens kept; 0 is off."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 2048
    """Budget of a completion, EOS included."""

    def parameters(self, seed: int) -> SamplingParameters:
        shared = self.model_dump(include={"temperature", "top_p", "top_k", "max_new_tokens"})
        return SamplingParameters(seed=seed, **shared)


class SolverSection(SamplingSection):
    batch: Annotated[int, Field(ge=1)] = 32
    """Completions sampled together."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 2048
    """A longer question is refused, never cut."""
    merge_adapter: bool = True
    """Add the adapter to the weights for sampling: faster, exact in float32 only."""


class LoraSection(Section):
    rank: Annotated[int, Field(ge=1)] = 64
    """Rank of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 128
    """The adapter's output is scaled by alpha / rank."""
    target_modules: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Linear layers that get an adapter. Never the output head: student and teacher share it."""

    @model_validator(mode="after")
    def _head_is_shared(self) -> LoraSection:
        if {"lm_head", "all-linear"} & set(self.target_modules):
            raise ValueError("target_modules must not hold lm_head: student and teacher share the output head")
        return self


class TrainerSection(Section):
    steps: Annotated[int, Field(ge=1)] = 70
    """Updates, each on one batch of rollouts."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Rollouts of an update."""
    micro_batch: Annotated[int, Field(ge=1)] = 8
    """Rollouts computed together; the loss does not depend on it."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-6
    """AdamW, constant, no weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    max_teacher_prompt_tokens: Annotated[int, Field(ge=1)] = 6144
    """A longer teacher prompt drops the rollout with the counted reason ``teacher_prompt_too_long``."""
    logit_chunk: Annotated[int, Field(ge=1)] = 512
    """Tokens whose full-vocabulary logits exist at once."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 1
    """Updates between checkpoints: so many at most are made again after a crash. Above 1 this needs arithmetic that
    gives the same bits again, as on a CPU: an adapter that was published must come out the same."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept for resuming, besides the best by validation. Published adapters are all kept."""
    max_staleness: Literal[0] = 0
    """Newest policy version minus a rollout's. 0: synchronous and on-policy, as in the paper."""
    token_view: Annotated[int, Field(ge=0)] = 12
    """Rollouts of the first and of the last update whose tokens the report shows one by one; 0 for none."""
    lora: LoraSection = LoraSection()


class EvaluationSection(SamplingSection):
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Sampling temperature of evaluations, reported with the figures."""
    samples: Annotated[int, Field(ge=1)] = 12
    """Completions per problem: n of Avg@k, Maj@k and Pass@k, with k = n."""
    every: Annotated[int, Field(ge=1)] = 10
    """Steps between evaluated checkpoints."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Completions sampled together."""


class AlarmsSection(Section):
    """When an update looks wrong. An alarm is logged, counted and reported; it does not stop the run.

    Figures are means over ``window`` updates; factors compare them with the mean of the first ``window`` updates.
    """

    window: Annotated[int, Field(ge=1)] = 5
    """Updates whose mean is watched."""
    entropy_factor: Annotated[float, Field(gt=1)] = 10.0
    """Alarm ``entropy``: the student's entropy grew or fell by this factor."""
    entropy_floor: Annotated[float, Field(ge=0)] = 0.05
    """Entropies below this many nats count as this much: a model that is always sure has none to compare with."""
    length_factor: Annotated[float, Field(gt=1)] = 2.0
    """Alarm ``length``: completions became longer or shorter by this factor."""
    truncated: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Alarm ``truncated``: more than this share of the rollouts ran out of tokens."""
    grad_norm_factor: Annotated[float, Field(gt=1)] = 10.0
    """Alarm ``grad_norm``: the gradient's norm grew by this factor. What is not clipped is no cause for alarm."""
    signal_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Alarm ``no_signal``: less than this share of the tokens in scope is pushed anywhere."""
    first_token_kl: Annotated[float, Field(gt=0)] = 5.0
    """Alarm ``first_token_kl``: teacher and student disagree by more nats on the first token, as about ``<think>``."""


class Config(BaseSettings):
    """The whole configuration. Read it with :func:`load_config`."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=_DELIMITER,
        nested_model_default_partial_update=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_prog_name="stepalign",
    )

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    queue: QueueSection = QueueSection()
    critic: CriticSection
    solver: SolverSection = SolverSection()
    trainer: TrainerSection = TrainerSection()
    evaluation: EvaluationSection = EvaluationSection()
    arm: ArmSection = ArmSection()
    alarms: AlarmsSection = AlarmsSection()

    @model_validator(mode="after")
    def _queue_holds_what_two_checkpoints_need(self) -> Config:
        """Rollouts stay in the queue until a second checkpoint holds them."""
        needed = 2 * self.trainer.batch * self.trainer.checkpoint_every
        if self.queue.capacity < needed:
            raise ValueError(
                f"queue.capacity is {self.queue.capacity}; it must be at least 2 × trainer.batch × "
                f"trainer.checkpoint_every = {needed}, or the solver and the trainer wait for each other"
            )
        return self

    @model_validator(mode="after")
    def _merging_is_exact(self) -> Config:
        if self.solver.merge_adapter and self.model.dtype is not Dtype.FLOAT32:
            raise ValueError("solver.merge_adapter rounds small adapters away in 16 bits; set it to false")
        return self

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    @model_validator(mode="after")
    def _groups_fill_batches(self) -> Config:
        if self.trainer.batch % self.arm.group_size:
            raise ValueError(
                f"trainer.batch is {self.trainer.batch}; it must be a multiple of arm.group_size = "
                f"{self.arm.group_size}, since groups are trained on whole"
            )
        return self

    def as_report(self) -> dict[str, Any]:
        """All values but the addresses of servers, which change from start to start."""
        return self.model_dump(mode="json", exclude={"queue": {"redis_url"}, "critic": {"url"}})

    @property
    def arm_name(self) -> str:
        """The arm's name in reports: that of the file without its suffix."""
        return Path(self.run.arm).stem


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
            arm = _read_arm(arms[0] if arms else RunSection().arm)
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
    return sorted(Path(entry.name).stem for entry in files("stepalign.arms").iterdir() if entry.name.endswith(".toml"))


def _read_arm(name: str) -> dict[str, Any]:
    """The keys of an arm's file. Raises ConfigError when there is none."""
    if name.endswith(".toml"):
        return _read_table(Path(name))
    if name not in shipped_arms():
        raise ConfigError(
            f"run.arm: there is no arm {name!r}; shipped are {', '.join(shipped_arms())}, and the path of a TOML file "
            "is taken too"
        )
    with as_file(files("stepalign.arms") / f"{name}.toml") as path:
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
                    names |= walk(kind, full + _DELIMITER)
        return names

    return walk(Config, ENV_PREFIX)


def _refuse_unknown_variables(environ: dict[str, str]) -> None:
    known = known_variables()
    unknown = sorted(key for key in environ if key.upper().startswith(ENV_PREFIX) and key.upper() not in known)
    if unknown:
        raise ConfigError(
            f"unknown environment variable(s) {', '.join(unknown)}; sections and keys are joined by two underscores, "
            f"as in {ENV_PREFIX}TRAINER{_DELIMITER}STEPS"
        )


def _explain(error: ValidationError) -> str:
    """Each problem with the key it is about."""
    lines: list[str] = []
    for item in error.errors():
        message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        lines.append(f"{'.'.join(map(str, item['loc'])) or 'configuration'}: {message}")
    return "; ".join(lines)
