"""Ask a critic for the critiques that are missing, several at a time, and keep each answer at once."""

from __future__ import annotations

import time
from asyncio import TaskGroup
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from stepalign.client import CriticClient
from stepalign.errors import (
    ConfigError,
    CriticError,
    CriticRequestError,
    CriticUnavailableError,
    StepalignError,
)
from stepalign.types import CriticIdentity, CritiqueRequest, CritiqueResponse
from stepalign_report.critic_quality.rows import Refusal, Row, Told
from stepalign_run.data import LabelledSolution

REFUSED_STATUSES = frozenset({400, 413, 422})
"""Of refusals that are about the row. Any other, such as that of the key, holds for all rows and ends the asking."""


class KeptRows(Protocol):
    """Where answers are kept, each at once: ``rows`` are the ids of those that are there."""

    @property
    def rows(self) -> Container[str]: ...

    def append(self, row: Row, /) -> None: ...


@dataclass
class Asked:
    """The outcome of asking. ``unanswered`` has the last reason of each solution that got no answer, by its id."""

    unanswered: dict[str, str] = field(default_factory=dict[str, str])
    stopped: StepalignError | None = None
    """The error for which no more was asked."""


def request_of(solution: LabelledSolution, told: Told) -> CritiqueRequest:
    return CritiqueRequest(
        question=solution.question,
        steps=list(solution.steps),
        reference_solution=solution.reference_solution if told.reference_solution else None,
        answer=solution.answer if told.answer else None,
    )


async def identity_of(client: CriticClient) -> CriticIdentity:
    """The identity that the critic's answers will carry. Raises CriticError where there is no critic."""
    (model, *_) = (await client.models()).data
    return CriticIdentity(
        model=model.id,
        weights_revision=model.weights_revision,
        prompt_version=model.prompt_version,
        backend=model.backend,
        settings=model.settings,
    )


async def ask(
    client: CriticClient,
    critic: CriticIdentity,
    solutions: Iterable[LabelledSolution],
    told: Told,
    rows: KeptRows,
    *,
    concurrency: int,
    on_row: Callable[[Row], None],
) -> Asked:
    """Ask for the solutions that have no row. A refusal of one request is a row; a failed call is none.

    Asking ends at the first error that holds for all rows: a critic that is gone, or another one in its place.
    """
    asked = Asked()
    waiting = iter([solution for solution in solutions if solution.id not in rows.rows])

    async def work() -> None:
        for solution in _until_stopped(waiting, asked):
            began = time.monotonic()
            try:
                response = await client.critique(request_of(solution, told))
                _require_usable(response, critic)
                row = Row(id=solution.id, seconds=time.monotonic() - began, response=response)
            except CriticRequestError as error:
                if error.status not in REFUSED_STATUSES:
                    asked.stopped = asked.stopped or error
                    continue
                refusal = Refusal(status=error.status, code=error.code, message=str(error))
                row = Row(id=solution.id, seconds=time.monotonic() - began, refusal=refusal)
            except CriticUnavailableError as error:
                asked.unanswered[solution.id] = str(error)
                if asked.stopped is None and await _is_gone(client):
                    asked.stopped = error
                continue
            except CriticError as error:
                asked.unanswered[solution.id] = str(error)
                continue
            except ConfigError as error:
                asked.stopped = asked.stopped or error
                continue
            rows.append(row)
            on_row(row)

    async with TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return asked


def _until_stopped(waiting: Iterator[LabelledSolution], asked: Asked) -> Iterator[LabelledSolution]:
    for solution in waiting:
        yield solution
        if asked.stopped is not None:
            return


async def _is_gone(client: CriticClient) -> bool:
    """Whether the critic answers nothing at all. One that is there was too slow for one request, or too busy."""
    try:
        await client.models()
    except CriticUnavailableError:
        return True
    return False


def _require_usable(response: CritiqueResponse, critic: CriticIdentity) -> None:
    """Raises ConfigError for an answer of another critic, and CriticError for probabilities of other steps."""
    if response.critic != critic:
        raise ConfigError(
            f"another critic answers than at the start ({response.critic.model}, not {critic.model}, or in another "
            "version); measure one at a time, each into an --out of its own"
        )
    if response.p_wrong is not None and len(response.p_wrong) != len(response.attempt.steps):
        raise CriticError(
            f"the critic gave {len(response.p_wrong)} probabilities (p_wrong) for {len(response.attempt.steps)} steps"
        )
