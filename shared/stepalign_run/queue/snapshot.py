"""Everything that a run's keys hold of its rollouts, read in one step, for an audit to compare with other records."""

from __future__ import annotations

import json
from dataclasses import dataclass

from stepalign_run.queue.base import QueueStatus
from stepalign_run.queue.redis_streams import GROUP
from stepalign_run.redis.connection import RedisConnection, run_key

_SNAPSHOT = """
-- KEYS: stream ledger seen dead; ARGV: group
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
if pending.err then
  if not string.find(pending.err, 'NOGROUP', 1, true) then return pending end
  pending = {0}
end
local function field(entries, name)
  local found = {}
  for _, entry in ipairs(entries) do
    local value = ''
    for i = 1, #entry[2], 2 do
      if entry[2][i] == name then value = entry[2][i + 1] end
    end
    table.insert(found, value)
  end
  return found
end
return {
  pending[1], redis.call('HGETALL', KEYS[2]), redis.call('SMEMBERS', KEYS[3]),
  field(redis.call('XRANGE', KEYS[1], '-', '+'), 'rollout'),
  field(redis.call('XRANGE', KEYS[4], '-', '+'), 'payload')
}
"""


@dataclass(frozen=True)
class QueueSnapshot:
    """Rollout ids by where they are, and how many entries hold no rollout id that can be read."""

    status: QueueStatus
    admitted: frozenset[str]
    """All that were ever admitted."""
    pending: frozenset[str]
    undecodable_pending: int
    dead: frozenset[str]
    undecodable_dead: int


async def read_snapshot(url: str, run_id: str, reconnect_seconds: float) -> QueueSnapshot:
    """Raises QueueUnavailableError when the server cannot be reached."""
    redis = RedisConnection(url, reconnect_seconds)
    keys = [run_key(run_id, name) for name in ("rollouts", "ledger", "seen", "dead")]
    try:
        claimed, flat, seen, pending, dead = await redis.script(_SNAPSHOT, keys, (GROUP,))
    finally:
        await redis.close()
    ledger = {name.decode(): int(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}
    waiting, broken = _rollout_ids(pending)
    buried, broken_dead = _rollout_ids(dead)
    return QueueSnapshot(
        status=QueueStatus.from_ledger(ledger, length=len(pending), claimed=claimed, dead_letters=len(dead)),
        admitted=frozenset(rollout_id.decode() for rollout_id in seen),
        pending=waiting,
        undecodable_pending=broken,
        dead=buried,
        undecodable_dead=broken_dead,
    )


def _rollout_ids(payloads: list[bytes]) -> tuple[frozenset[str], int]:
    found: list[str] = []
    for payload in payloads:
        try:
            found.append(json.loads(payload)["rollout_id"])
        except (ValueError, KeyError, TypeError):
            continue
    return frozenset(found), len(payloads) - len(found)
