"""The sections of the critic: the service's settings and those of its clients.

A critic alone reads :class:`CriticConfig`. A run's file has one table for both sides, :class:`RunCriticSection`: the
critic that the run starts, and how the trainer asks it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from stepalign.prompts.layout import is_in_turns
from stepalign_run.config.base import DEVICE, Dtype, Section, TemplateOptions
from stepalign_run.config.graders import AUTO, DEFAULT_PROMPTS, with_own_grader

_Omittable = Literal["max_tokens", "temperature"]
_OWN_BODY_FIELDS = {
    "model": "set critic.openai.model",
    "messages": "the service writes them",
    "temperature": "every backend decodes greedily; critic.openai.omit leaves it to the server",
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "set critic.max_new_tokens and max_tokens_field"),
    "chat_template_kwargs": "set critic.chat_template_options",
    **dict.fromkeys(("grammar", "structured_outputs"), "set critic.openai.grammar"),
    **dict.fromkeys(("logprobs", "top_logprobs"), "set critic.openai.logprobs"),
    **dict.fromkeys(("stream", "stream_options"), "an answer is read whole"),
    "n": "a critique is one answer",
}


class OpenAISection(Section):
    """The server that the critic's backend ``openai`` asks."""

    base_url: str | None = None
    """Its address, version included: ``http://127.0.0.1:8000/v1``."""
    model: str | None = None
    """The served model; unset, the server must serve exactly one."""
    revision: str = "unversioned"
    """The revision of the weights in every critique: no such server tells its own. Change it with the weights."""
    api_key_file: Path | None = None
    """A file that holds the server's API key."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long the server may take for one answer, or for all those of a critique in turns; and to come up."""
    max_tokens_field: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")] = "max_tokens"
    """The field of a request that holds ``critic.max_new_tokens``. Some models want ``max_completion_tokens``."""
    omit: list[_Omittable] = Field(default_factory=list[_Omittable])
    """Fields that are not sent, because the server refuses them: it then decides them itself."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, such as ``{reasoning_effort = "low"}``. Refused are the service's own."""
    grammar: Literal["none", "structured_outputs", "grammar"] = "none"
    """How the server takes the grammar of a critique (prompt sets in turns): vLLM in ``structured_outputs``, llama.cpp
    in ``grammar``. Without one a model's correction is read as it comes, and may be refused."""
    logprobs: bool = True
    """Whether the server is asked for probabilities, with ``logprobs`` and ``top_logprobs``. Without them a step's word
    counts as it is said, and no critique has ``p_wrong``."""
    probe: bool = True
    """Whether the server is asked for a word at the start, and after a refusal, to tell whether it takes the fields
    that every request has. It costs some tokens."""

    @field_validator("extra_body")
    @classmethod
    def _only_further_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        refused = sorted(fields.keys() & _OWN_BODY_FIELDS.keys())
        if refused:
            raise ValueError("; ".join(f"{name}: {_OWN_BODY_FIELDS[name]}" for name in refused))
        return fields

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        name = self.max_tokens_field
        if name in _OWN_BODY_FIELDS.keys() - {"max_tokens", "max_completion_tokens"}:
            raise ValueError(f"max_tokens_field: {name!r} is another field of every request")
        if name in self.extra_body:
            raise ValueError(f"extra_body: {name} is max_tokens_field, which holds critic.max_new_tokens")
        if name != "max_tokens" and "max_tokens" in self.omit:
            raise ValueError("max_tokens_field has no effect where omit leaves the budget out; remove one of them")
        return self


_OWN_ENGINE_ARGS = {
    "model": "set critic.path",
    "tokenizer": "set critic.path, whose folder holds the tokenizer",
    "dtype": "set critic.dtype",
    "max_model_len": "set critic.max_prompt_tokens and critic.max_new_tokens",
    "max_num_seqs": "set critic.max_batch",
    "gpu_memory_utilization": "set critic.vllm.gpu_memory_utilization",
    "tensor_parallel_size": "set critic.vllm.tensor_parallel_size",
    "enable_prefix_caching": "it is always on",
    "structured_outputs_config": "aligned decoding needs llguidance",
    "load_format": "only safetensors are loaded",
    **dict.fromkeys(
        ("speculative_config", "spec_method", "spec_model", "spec_tokens"),
        "no speculative decoding: what is copied is read as a prompt, and what is written follows a grammar",
    ),
    **dict.fromkeys(("logprobs_mode", "max_logprobs"), "aligned decoding reads the model's own log-probabilities"),
    **dict.fromkeys(
        (
            "model_weights",
            "hf_config_path",
            "hf_overrides",
            "config_format",
            "tokenizer_mode",
            "tokenizer_revision",
            "skip_tokenizer_init",
            "generation_config",
            "override_generation_config",
            "default_mm_loras",
            "weight_transfer_config",
        ),
        "the folder critic.path alone makes the critic",
    ),
    **dict.fromkeys(
        (
            "trust_remote_code",
            "worker_cls",
            "worker_extension_cls",
            "scheduler_cls",
            "logits_processors",
            "model_class_overrides",
            "io_processor_plugin",
            "reasoning_parser_plugin",
            "distributed_executor_backend",
            "kv_transfer_config",
            "ec_transfer_config",
        ),
        "no code is loaded by configuration",
    ),
}


_ORIGIN = r"^(\*|null|[a-z][a-z0-9+.-]*://[^/\s]+)$"


class VllmSection(Section):
    """The engine of the critic's backend ``vllm``."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory for weights and cache; vLLM's CPU build takes it as a share of the machine's."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share one model."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's ``AsyncEngineArgs``, such as ``{kv_cache_dtype = "fp8"}``. Refused are arguments
    with a field of their own, and those that load other files than the model's safetensors or run their code."""

    @field_validator("engine_args")
    @classmethod
    def _only_further_ones(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        refused = sorted(arguments.keys() & _OWN_ENGINE_ARGS.keys())
        if refused:
            raise ValueError("; ".join(f"{name}: {_OWN_ENGINE_ARGS[name]}" for name in refused))
        return arguments


class CriticServerSection(Section):
    """The settings of a critic service."""

    backend: Literal["transformers", "vllm", "openai", "program"] = "transformers"
    """``transformers`` and ``vllm``: a frozen language model in the process. ``openai``: one behind an
    OpenAI-compatible server. ``program``: an exact checker."""
    path: Path | None = None
    """Folder of the critic model (backends ``transformers`` and ``vllm``)."""
    checker: str | None = None
    """Name in the entry-point group ``stepalign.checkers`` (backend ``program``)."""
    prompts: str = DEFAULT_PROMPTS
    """Prompt set of the critic. ``chat-v2`` asks in turns; ``chat-v1`` and sets like it, for the whole critique at
    once."""
    grader: str = AUTO
    """How the critic compares answers, as ``data.grader``. ``auto``: as the run does; of a critic alone, ``math``
    beside ``prompts`` that begin with ``chat``, else ``exact``."""
    chat_template_options: TemplateOptions = Field(default_factory=dict)
    """Options of the critic's chat template."""
    decoding: Literal["aligned", "free"] = "aligned"
    """``aligned``: the model decides step by step and writes only what is not copied, so that no critique fails for its
    form. ``free``: it writes all of it, and what is out of form is refused. The backend ``openai`` aligns with prompt
    sets in turns."""
    trust_answers: bool = True
    """Whether a right answer clears an attempt's steps and a wrong one convicts one of them, where the known answer is
    sent. Switch it off where wrong steps often come to the right answer."""
    wrong_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The ``p_wrong`` over which a step is called wrong, where no known answer settles whether there is an error. Of a
    model that seldom says "wrong", ``stepalign critic-quality --without-answer`` finds the best one."""
    check_known_attempts: bool = True
    """Whether a critic that does not tell right steps of known attempts from wrong ones is refused at the start."""
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
    """How long requests in progress may take to be answered after the grace; new ones are refused meanwhile."""
    keep_alive_seconds: Annotated[int, Field(ge=1)] = 90
    """How long a connection without a request stays open: longer than clients and load balancers keep theirs, or some
    of their requests meet a connection that is being closed."""
    max_connections: Annotated[int, Field(ge=1)] = 768
    """Most connections. A further one takes the place of one that waits for its client; where all are being answered,
    only checks of health are."""
    address_file: Path | None = None
    """A file that holds the service's address while it listens. Unset, the service writes no file."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 128 * 1024
    """Largest body of a request. A load balancer repeats only bodies that fit its buffer: raise ``tune.bufsize`` of
    services/lb/haproxy.cfg with it."""
    max_batch_items: Annotated[int, Field(ge=1)] = 64
    """Most critiques that one request may ask for. The whole of it must fit ``max_body_bytes``."""
    max_steps: Annotated[int, Field(ge=1)] = 1000
    """An attempt of more steps is refused."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 8192
    """A longer prompt is refused, never cut."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 4096
    """Budget of the critique. In aligned decoding an attempt whose copies leave too little of it is refused; in free
    decoding a critique that needs more is a truncated one. A thought before it may take as much again."""
    max_batch: Annotated[int, Field(ge=1)] = 32
    """Most requests generated together. The backend ``openai`` has no more open at a time."""
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
    cors_origins: list[Annotated[str, Field(pattern=_ORIGIN)]] = Field(default_factory=list[str])
    """Origins whose pages may ask the service from a browser, as ``["https://app.example.org"]``, without a slash at
    the end; ``["*"]`` stands for all."""
    openai: OpenAISection = OpenAISection()
    vllm: VllmSection = VllmSection()

    def shaping(self) -> dict[str, Any]:
        """The settings that a critique depends on, apart from the critic's weights."""
        decisive = {
            "backend",
            "checker",
            "prompts",
            "grader",
            "chat_template_options",
            "dtype",
            "decoding",
            "trust_answers",
            "wrong_threshold",
        }
        asked = {"base_url", "model", "revision", "max_tokens_field", "omit", "extra_body", "grammar", "logprobs"}
        of_backend = {"openai": {"openai": asked}, "vllm": {"vllm": {"engine_args"}}}
        served = of_backend.get(self.backend, {})
        included = dict.fromkeys([*decisive, "max_prompt_tokens", "max_new_tokens"], True)
        return self.model_dump(mode="json", include={**included, **served})

    @property
    def _is_started(self) -> bool:
        """Whether a critic is started with these settings."""
        return True

    @model_validator(mode="before")
    @classmethod
    def _names_its_grader(cls, values: Any) -> Any:
        return with_own_grader(cast(dict[str, Any], values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _backend_is_complete(self) -> Self:
        if not self._is_started:
            return self
        if self.backend in ("transformers", "vllm") and self.path is None:
            raise ValueError(f"backend {self.backend!r} needs critic.path, the folder of the critic model")
        if self.backend == "openai" and self.openai.base_url is None:
            raise ValueError("backend 'openai' needs critic.openai.base_url, such as http://127.0.0.1:8000/v1")
        if self.backend == "program" and self.checker is None:
            raise ValueError("backend 'program' needs critic.checker, a name in the group stepalign.checkers")
        return self

    @model_validator(mode="after")
    def _turns_are_aligned(self) -> Self:
        if self.decoding == "free" and self.backend != "program" and is_in_turns(self.prompts):
            raise ValueError(
                f'the prompt set {self.prompts!r} asks in turns, which needs critic.decoding = "aligned"; for free '
                "decoding set critic.prompts to another one, such as 'chat-v1'"
            )
        return self

    @model_validator(mode="after")
    def _every_table_has_an_effect(self) -> Self:
        for name, untouched in (("openai", OpenAISection()), ("vllm", VllmSection())):
            if self.backend != name and getattr(self, name) != untouched:
                raise ValueError(f"critic.{name} has no effect with backend {self.backend!r}; remove it")
        return self


class CriticClientSection(Section):
    """The settings of a client of the critic, as the trainer is one."""

    url: str | None = None
    """Address of a critic service or load balancer. Unset, ``stepalign run`` starts a critic."""
    api_key_file: Path | None = None
    """A file that holds the API key which the trainer sends."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long the trainer waits for one critique."""
    concurrency: Annotated[int, Field(ge=1)] = 32
    """Most critiques that the trainer requests at once."""


class RunCriticSection(CriticServerSection, CriticClientSection):
    """The table ``[critic]`` of a run: the critic that the run starts, unless ``url`` names one, and its client."""

    @property
    def _is_started(self) -> bool:
        return self.url is None


class CriticConfig(Section):
    """The whole configuration of a critic. Read it with ``load_critic_config``."""

    critic: CriticServerSection
