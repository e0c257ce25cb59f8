"""The hand-over of adapter versions from the trainer to the solver. The adapter's files stay on a shared disk.

A store holds the newest version and whether training has ended.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field, model_validator

from stepalign.errors import PolicyError
from stepalign.fields import TokenId, WellFormed
from stepalign.types import Wire
from stepalign_run.config import QueueSection
from stepalign_run.fields import Version
from stepalign_run.folder.layout import ADAPTER_FILE
from stepalign_run.queue import require_redis_url
from stepalign_run.redis.connection import RedisConnection, run_key


class Canary(Wire):
    """A fixed sequence and the policy's log-probabilities ``[T]`` of its completion, at T = 1 and in nats."""

    prompt_token_ids: Annotated[list[TokenId], Field(min_length=1)]
    completion_token_ids: Annotated[list[TokenId], Field(min_length=1)]
    logprobs: list[float]

    @model_validator(mode="after")
    def _one_value_a_token(self) -> Canary:
        if len(self.logprobs) != len(self.completion_token_ids):
            raise ValueError("a canary has one log-probability for each token of its completion")
        return self


class PolicyVersion(Wire):
    """A published adapter. Version 0 is the base model: no adapter, empty ``path`` and ``sha256``, no canary."""

    version: Version
    path: WellFormed
    """Folder of the adapter."""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    """Of the adapter's weights file, in hexadecimal."""
    canary: Canary | None = None
    """Log-probabilities that a model with this adapter must reproduce."""

    @model_validator(mode="after")
    def _only_the_base_has_no_adapter(self) -> PolicyVersion:
        given = {bool(self.path), bool(self.sha256), self.canary is not None}
        if given != {self.version > 0}:
            raise ValueError("path, sha256 and canary are empty for version 0 and set for every later one")
        return self


class TrainingFinishedError(PolicyError):
    """The version that is waited for will never come: training has ended before it."""


class PolicyStore(Protocol):
    """Every method raises QueueUnavailableError when the server cannot be reached."""

    async def publish(self, policy: PolicyVersion) -> bool:
        """Make a version the newest, and training unfinished. False, and nothing changed, if a later one is there."""
        ...

    async def latest(self) -> PolicyVersion | None: ...

    async def wait_for(self, version: int, poll_seconds: float) -> PolicyVersion:
        """Wait until the newest version is ``version`` or later. Raises TrainingFinishedError if that cannot be."""
        ...

    async def finish(self) -> None:
        """Tell the solver that no version will follow. Publishing again takes it back."""
        ...

    async def finished(self) -> bool: ...

    async def announce_sampled(self, version: int) -> None:
        """Tell the trainer that the whole batch of ``version`` has been published."""
        ...

    async def last_sampled(self) -> int:
        """The newest version whose whole batch has been published; −1 before the first."""
        ...

    async def close(self) -> None: ...


async def wait_for_version(store: PolicyStore, version: int, poll_seconds: float) -> PolicyVersion:
    while True:
        # Asked first: a version that was published before the end must still be seen.
        ended = await store.finished()
        latest = await store.latest()
        if latest is not None and latest.version >= version:
            return latest
        if ended:
            newest = "none" if latest is None else latest.version
            raise TrainingFinishedError(f"training ended before policy version {version}; the newest is {newest}")
        await asyncio.sleep(poll_seconds)


_PUBLISH = """
-- KEYS: policy finished; ARGV: version, JSON
local current = redis.call('GET', KEYS[1])
if current and cjson.decode(current).version > tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2])
return 1
"""


class RedisPolicyStore:
    """Keys: ``stepalign:{<run_id>}:policy`` holds the newest version as JSON, ``…:finished`` exists after the end,
    ``…:sampled`` holds the version whose batch was published last."""

    def __init__(self, url: str, run_id: str, reconnect_seconds: float) -> None:
        self._redis = RedisConnection(url, reconnect_seconds)
        self._policy = run_key(run_id, "policy")
        self._finished = run_key(run_id, "finished")
        self._sampled = run_key(run_id, "sampled")

    async def publish(self, policy: PolicyVersion) -> bool:
        arguments = (policy.version, policy.model_dump_json())
        return await self._redis.script(_PUBLISH, (self._policy, self._finished), arguments) == 1

    async def latest(self) -> PolicyVersion | None:
        stored: bytes | None = await self._redis.command("GET", self._policy)
        return None if stored is None else PolicyVersion.model_validate_json(stored)

    async def wait_for(self, version: int, poll_seconds: float) -> PolicyVersion:
        return await wait_for_version(self, version, poll_seconds)

    async def finish(self) -> None:
        await self._redis.command_synced("SET", self._finished, "1")

    async def finished(self) -> bool:
        return await self._redis.command("EXISTS", self._finished) == 1

    async def announce_sampled(self, version: int) -> None:
        await self._redis.command("SET", self._sampled, str(version))

    async def last_sampled(self) -> int:
        stored: bytes | None = await self._redis.command("GET", self._sampled)
        return -1 if stored is None else int(stored)

    async def close(self) -> None:
        await self._redis.close()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: Path) -> str:
    """One digest over a model folder's safetensors files, in hexadecimal."""
    digests = [file_sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def verify_adapter(policy: PolicyVersion) -> None:
    """Raise PolicyError unless the adapter's weights are there and are those that were published."""
    if policy.version == 0:
        return
    path = Path(policy.path) / ADAPTER_FILE
    try:
        found = file_sha256(path)
    except OSError as error:
        raise PolicyError(f"policy version {policy.version}: {path} cannot be read: {error.strerror}") from None
    if found != policy.sha256:
        raise PolicyError(
            f"policy version {policy.version}: {path} has SHA-256 {found}, published was {policy.sha256}; "
            "the file was changed or copied in part"
        )


def verify_canary(policy: PolicyVersion, found: Sequence[float], tolerance: float) -> None:
    """Raise PolicyError unless the loaded model's log-probabilities are the published ones.

    They may differ by ``tolerance`` nats in the mean over the tokens: rounding moves single tokens by many times the
    mean, another adapter or base model shows at most of them.
    """
    if policy.canary is None:
        return
    differences = [abs(ours - theirs) for ours, theirs in zip(found, policy.canary.logprobs, strict=True)]
    mean = sum(differences) / len(differences)
    # A value that is no number is never near enough.
    if not mean <= tolerance:
        raise PolicyError(
            f"policy version {policy.version}: the loaded model gives the canary log-probabilities that differ by "
            f"{mean:.3g} nats from the trainer's in the mean (allowed: {tolerance:g}). It samples with another adapter "
            "or another base model: compare model.path, model.dtype and solver.merge_adapter of both processes, and "
            "restart the solver"
        )


def open_policy_store(settings: QueueSection, run_id: str) -> PolicyStore:
    """The policy store on the queue's server. Raises ConfigError when no server is configured."""
    return RedisPolicyStore(require_redis_url(settings), run_id, settings.reconnect_seconds)
