"""The policy store inside one process."""

from __future__ import annotations

from stepalign_run.policy_store import PolicyVersion, wait_for_version


class MemoryPolicyStore:
    """The twin inside one process."""

    def __init__(self) -> None:
        self._latest: PolicyVersion | None = None
        self._ended = False
        self._sampled = -1

    async def publish(self, policy: PolicyVersion) -> bool:
        if self._latest is not None and self._latest.version > policy.version:
            return False
        self._latest = policy
        self._ended = False
        return True

    async def latest(self) -> PolicyVersion | None:
        return self._latest

    async def wait_for(self, version: int, poll_seconds: float) -> PolicyVersion:
        return await wait_for_version(self, version, poll_seconds)

    async def finish(self) -> None:
        self._ended = True

    async def finished(self) -> bool:
        return self._ended

    async def announce_sampled(self, version: int) -> None:
        self._sampled = version

    async def last_sampled(self) -> int:
        return self._sampled

    async def close(self) -> None:
        """Nothing to disconnect from."""
