"""Aligned decoding with a transformers model: the draft in one forward pass, then masked greedy text, several tokens a
pass where they can be foreseen.

One pass over prompt and draft gives the log-probabilities of every decision. What the chosen critique shares with the
draft stays in the cache; the rest of the draft's columns are masked out. Then each pass takes the tokens that are
certain (given text, and what the grammar forces) and those that a look-up proposes: where the last tokens stand in the
prompt, the ones that follow them there. A proposal counts only where it is the likeliest token that the grammar
allows, so the text is that of one token a pass.

``B`` rows, ``W`` columns of a pass, ``V`` tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from llguidance import LLMatcher
from transformers import DynamicCache

from stepalign.types import Forced
from stepalign_critic.decoding.bounds import cut_by_tokens
from stepalign_critic.decoding.draft import Asked, Draft, DraftTokens
from stepalign_critic.decoding.plan import Choosing, Plan, Remainder, Score
from stepalign_critic.decoding.tokens import GrammarTokens
from stepalign_models.caches import attends_to_everything, cache_parameter

_MOST_LOGITS = 2**28
"""Floats of the logits of one pass: 1 GiB."""
_PROPOSED = 8
_MATCHED = 3


@dataclass(frozen=True)
class Job:
    """The plan of a critique and its draft, the prompt and a thought included."""

    plan: Plan
    draft: Draft


@dataclass(frozen=True)
class Decoded:
    """What came of a job. ``tokens`` are those of the answer, given and forced ones included."""

    choosing: Choosing
    text: str
    forced: tuple[Forced, ...]
    tokens: list[int]


@dataclass
class _Row:
    """One job on its way."""

    index: int
    job: Job
    mask: list[int] = field(default_factory=list[int])
    pending: list[int] = field(default_factory=list[int])
    choosing: Choosing | None = None
    remainder: Remainder | None = None
    matcher: LLMatcher | None = None
    answer: list[int] = field(default_factory=list[int])
    written: list[int] = field(default_factory=list[int])
    following: list[int] = field(default_factory=list[int])
    failure: Exception | None = None
    places: dict[tuple[int, ...], int] | None = None
    """After which tokens of the draft which place comes: the latest one, that another token follows."""
    attended: list[int] = field(default_factory=list[int])
    """The columns that are attended to, in their order."""

    def feed(self, gap: int, count: int) -> None:
        """Add ``gap`` columns that are not attended to, and ``count`` that are."""
        self.attended += range(len(self.mask) + gap, len(self.mask) + gap + count)
        self.mask += [0] * gap + [1] * count

    @property
    def fed(self) -> int:
        """How many tokens in the cache are attended to."""
        return len(self.attended)

    def hide(self, columns: int) -> None:
        """Mask out the newest columns that are attended to."""
        for _ in range(columns):
            self.mask[self.attended.pop()] = 0

    def clear(self) -> None:
        """Begin anew with no column."""
        self.mask, self.attended = [], []

    def proposed(self) -> list[int]:
        """What follows in the draft where the last tokens stand there, the latest place first."""
        latest = (self.answer[-_MATCHED:] + self.written[-_MATCHED:])[-_MATCHED:]
        draft = self.job.draft.ids
        if self.places is None:
            windows = zip(*(draft[i:] for i in range(_MATCHED)), strict=False)
            self.places = dict(zip(windows, range(_MATCHED, len(draft)), strict=False))
        place = self.places.get(tuple(latest))
        return [] if place is None else draft[place : place + _PROPOSED]


class DraftedDecoder:
    """Decodes jobs together with ``model``. ``plain`` takes one token a pass: what drafts are measured against.

    ``decode`` runs in one thread; the tokenizer is used in it too.
    """

    def __init__(
        self, model: Any, drafts: DraftTokens, tokens: GrammarTokens, pad: int, *, plain: bool = False
    ) -> None:
        self._model = model
        self._drafts = drafts
        self._tokens = tokens
        self._pad = pad
        self._plain = plain
        self._cache_name = cache_parameter(model)
        self._together = attends_to_everything(model.config)
        self.passes = 0

    def decode(self, jobs: Sequence[Job], wanted: Callable[[int], bool]) -> list[Decoded | Exception]:
        """What comes of each job; the error of one whose plan refuses it. One that is not ``wanted`` may break off.

        In a window of attention a padded column takes the place of a token: such models decode one job at a time.
        """
        rows = [_Row(i, job) for i, job in enumerate(jobs)]
        results: dict[int, Decoded | Exception] = {}
        for group in [rows] if self._together else [[row] for row in rows]:
            with torch.inference_mode():
                results |= self._decode(group, wanted)
        return [results[i] for i in range(len(jobs))]

    def _decode(self, rows: list[_Row], wanted: Callable[[int], bool]) -> dict[int, Decoded | Exception]:
        results: dict[int, Decoded | Exception] = {}
        cache = DynamicCache(config=self._model.config)
        for row, scores in zip(rows, self._score(rows, cache), strict=True):
            with _failing(row):
                row.choosing = row.job.plan.choose(scores)
                self._begin(row)
        if not self._together:
            cache = self._again(rows, cache)
        while True:
            for row in rows:
                if row.matcher is None or row.failure is not None or not wanted(row.index):
                    results[row.index] = self._finished(row)
            kept = [i for i, row in enumerate(rows) if row.index not in results]
            if not kept:
                return results
            if len(kept) < len(rows):
                cache.batch_select_indices(torch.tensor(kept, device=self._model.device))
                rows = [rows[i] for i in kept]
            self._advance(rows, cache)

    def _score(self, rows: list[_Row], cache: DynamicCache) -> list[list[Score]]:
        """The scores of each row's deciding pieces."""
        drafts = [row.job.draft for row in rows]
        self._feed(rows, [draft.ids[: draft.prompt - 1] for draft in drafts], cache, keep=1, whole=True)
        feeds = [draft.ids[draft.prompt - 1 :] for draft in drafts]
        columns = max(1, _MOST_LOGITS // (len(rows) * self._model.config.get_text_config().vocab_size))
        found: list[dict[Asked, list[float]]] = [{} for _ in rows]
        for start in range(0, max(map(len, feeds)), columns):
            parts = [feed[start : start + columns] for feed in feeds]
            width = max(map(len, parts))
            # Each row's part ends at the last column.
            shifts = [draft.prompt - 1 + start - (width - len(part)) for part, draft in zip(parts, drafts, strict=True)]
            asked_of = [
                [
                    asked
                    for piece in draft.asked
                    for asked in piece
                    if 0 <= asked.place - draft.prompt + 1 - start < len(part)
                ]
                for part, draft in zip(parts, drafts, strict=True)
            ]
            places = sorted(
                {asked.place - shift for of_row, shift in zip(asked_of, shifts, strict=True) for asked in of_row}
            )
            # The head is a fifth of a small model's work: only the columns that are asked for go through it.
            logits = self._feed(rows, parts, cache, keep=torch.tensor(places or [width - 1], device=self._model.device))
            for r, (of_row, shift) in enumerate(zip(asked_of, shifts, strict=True)):
                for asked in of_row:
                    column = logits[r, places.index(asked.place - shift)].float()
                    found[r][asked] = column.log_softmax(-1)[list(asked.ids)].tolist()
        return [draft.scores(found[r].__getitem__) for r, draft in enumerate(drafts)]

    def _begin(self, row: _Row) -> None:
        """Leave the draft where the critique does. Raises BudgetTooSmallError."""
        assert row.choosing is not None
        plan, draft = row.job.plan, row.job.draft
        remainder = row.remainder = plan.remainder(row.choosing.place, self._drafts.count)
        row.answer = self._drafts.answer(plan, draft, remainder)
        if remainder.grammar is None:
            return
        following = row.following = self._drafts.following(plan, draft, remainder)
        row.matcher = self._tokens.matcher(remainder.grammar)
        shared = next(
            (i for i, (a, b) in enumerate(zip(draft.ids, following, strict=False)) if a != b),
            min(len(draft.ids), len(following)),
        )
        # The last token of what is given is fed once more where it is in already: the text goes on from its logits.
        kept = min(shared, len(following) - 1)
        row.hide(row.fed - kept)
        row.pending = following[kept:]
        self._take_forced(row)

    def _again(self, rows: list[_Row], cache: DynamicCache) -> DynamicCache:
        """A cache of what is kept alone, for models whose cache has no column to be masked out."""
        fresh = DynamicCache(config=self._model.config)
        for row in rows:
            kept = row.following[: row.fed]
            row.clear()
            self._feed([row], [kept], fresh, keep=1, whole=True)
        return fresh

    def _advance(self, rows: list[_Row], cache: DynamicCache) -> None:
        """One pass: what is pending and proposed goes in, and each row takes the tokens that come of it."""
        proposals = [[] if self._plain or not self._together else row.proposed() for row in rows]
        feeds = [row.pending + proposal for row, proposal in zip(rows, proposals, strict=True)]
        keep = 1 + max(map(len, proposals))
        logits = self._feed(rows, feeds, cache, keep=keep)
        for r, (row, proposal) in enumerate(zip(rows, proposals, strict=True)):
            with _failing(row):
                # The last column is that of the last proposal.
                self._take(row, proposal, logits[r, keep - 1 - len(proposal) :])

    def _take(self, row: _Row, proposal: list[int], logits: torch.Tensor) -> None:
        """Take the likeliest token after each that is in, ``logits [1 + proposed, V]``, as long as it was proposed."""
        matcher = row.matcher
        assert matcher is not None
        taken = 0
        row.pending = []
        while True:
            token = self._tokens.best(matcher, logits[taken])
            row.written.append(token)
            if taken == len(proposal) or token != proposal[taken] or matcher.is_stopped():
                row.pending.append(token)
                break
            taken += 1
            forced = self._tokens.forced(matcher)
            row.written += forced
            agreed = next((i for i, t in enumerate(forced) if proposal[taken + i : taken + i + 1] != [t]), len(forced))
            taken += agreed
            if agreed < len(forced):
                row.pending += forced[agreed:]
                break
            if matcher.is_stopped():
                break
        row.hide(len(proposal) - taken)
        if matcher.is_stopped():
            row.matcher = None
            return
        self._take_forced(row)

    def _take_forced(self, row: _Row) -> None:
        assert row.matcher is not None
        forced = self._tokens.forced(row.matcher)
        row.written += forced
        row.pending += forced
        if row.matcher.is_stopped():
            row.matcher = None

    def _feed(
        self,
        rows: list[_Row],
        feeds: list[list[int]],
        cache: DynamicCache,
        *,
        keep: int | torch.Tensor,
        whole: bool = False,
    ) -> torch.Tensor:
        """Feed each row its tokens, at the right of ``W`` columns; the logits ``[B, K, V]`` of the columns to keep.

        ``keep`` is the number of last columns, or the columns ``[K]``.
        """
        width = max(map(len, feeds))
        if self._plain and not whole and width > 1:
            padded = [[None] * (width - len(feed)) + feed for feed in feeds]
            passes = [
                self._pass(rows, [[] if row[i] is None else [row[i]] for row in padded], cache, 1) for i in range(width)
            ]
            return torch.cat(passes[-keep:], dim=1) if isinstance(keep, int) else torch.cat(passes, dim=1)[:, keep]
        return self._pass(rows, feeds, cache, keep) if width else torch.empty(0)

    def _pass(
        self, rows: list[_Row], feeds: list[list[Any]], cache: DynamicCache, keep: int | torch.Tensor
    ) -> torch.Tensor:
        self.passes += 1
        width = max(map(len, feeds))
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        for row, feed in zip(rows, feeds, strict=True):
            gap = width - len(feed)
            ids.append([self._pad] * gap + feed)
            positions.append([0] * gap + list(range(row.fed, row.fed + len(feed))))
            row.feed(gap, len(feed))
        device = self._model.device
        return self._model(
            input_ids=torch.tensor(ids, device=device),
            position_ids=torch.tensor(positions, device=device),
            attention_mask=torch.tensor([row.mask for row in rows], device=device),
            use_cache=True,
            logits_to_keep=keep,
            **{self._cache_name: cache},
        ).logits

    def _finished(self, row: _Row) -> Decoded | Exception:
        if row.failure is not None:
            return row.failure
        with _failing(row):
            assert row.choosing is not None and row.remainder is not None
            # Together, since some tokenizers write the first token of a text without the space before it.
            text = self._drafts.decode(self._drafts.encode(row.remainder.open_text) + row.written)
            finished = row.job.plan.finish(row.choosing, text, cut_by_tokens(text))
            return Decoded(row.choosing, finished.text, finished.forced, row.answer + row.written)
        assert row.failure is not None, "what does not return has failed"
        return row.failure


@contextmanager
def _failing(row: _Row) -> Iterator[None]:
    """Keep an error of one row from the others of its batch."""
    try:
        yield
    except Exception as error:
        row.failure = error
