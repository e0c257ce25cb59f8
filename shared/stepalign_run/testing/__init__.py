"""Twins of the queue and of the policy store inside one process, for tests; both pass the contract of the real ones."""

from stepalign_run.testing.policy_store import MemoryPolicyStore
from stepalign_run.testing.queue import MemoryBroker, MemoryRolloutQueue

__all__ = ["MemoryBroker", "MemoryPolicyStore", "MemoryRolloutQueue"]
