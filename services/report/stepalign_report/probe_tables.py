"""A probe as tables for the terminal, and its recommendation."""

from __future__ import annotations

from stepalign.commands.terminal import Table
from stepalign_run.probing import ArmFigures, CritiqueFigures, Estimate, ProbeReport

CAVEAT = (
    "a probe sees the base model and one batch: it says which arm starts out pushing the right way, not how far a run "
    "gets; scores of distillation and of GRPO are not the same quantity"
)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _nats(value: float | None) -> str:
    # + 0.0: no "-0.00"
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"


def _share(rate: Estimate | None) -> str:
    return "–" if rate is None else f"{100 * rate.value:.0f} ({100 * rate.lower:.0f}–{100 * rate.upper:.0f})"


def _score(score: Estimate | None) -> str:
    return "–" if score is None else f"{score.value:.3f} ({score.lower:.3f}–{score.upper:.3f})"


def probe_table(title: str, *headings: str, text: int = 1, caption: str | None = None) -> Table:
    """The first ``text`` columns are texts, the others numbers. Narrow enough for a terminal of 80 columns."""
    table = Table(title, caption=caption, compact=True)
    for i, heading in enumerate(headings):
        table.add_column(heading, number=i >= text)
    return table


def probe_tables(report: ProbeReport) -> list[Table]:
    """Contexts, arms by rank, critiques. Tables without rows are left out."""
    tables = [contextsprobe_table(report), armsprobe_table(report)]
    if report.critiques is not None:
        tables.append(critiquesprobe_table(report.critiques))
    return [table for table in tables if table.rows]


def contextsprobe_table(report: ProbeReport) -> Table:
    table = probe_table(
        f"{report.rollouts} rollouts of the base, {report.with_error} with a known error; {report.samples} samples "
        "of each teacher",
        "teacher sees",
        "teacher\nright, %",
        "steps,\n%",
        "solu-\ntion",
        "A,\nright",
        "below\n−0.1",
        "A,\nerror",
        "A,\nafter",
        caption="in brackets: 95 % interval. steps: every step right too. solution: gain of a correct one, nats per "
        "token. A: log p(teacher) − log p(student) of the rollout's tokens: of right ones, with the share below −0.1 "
        "in percent, at the first error, after its step",
    )
    for context in report.contexts:
        contrast = context.contrast
        table.add_row(
            context.kind.value,
            _share(context.solve_rate),
            _percent(context.trace_rate),
            _nats(context.solution_gain),
            _nats(contrast.correct),
            _percent(contrast.below),
            _nats(contrast.at_error),
            _nats(contrast.tail),
        )
    return table


SCOPES = {"full": "", "through_first_error": ", to first error", "random_step": ", to random step"}


def armsprobe_table(report: ProbeReport) -> Table:
    table = probe_table("arms, best score first", "", "arm", "pushes by", "focus", "score (95 % interval)", text=3)
    for rank, arm in enumerate(report.arms, start=1):
        pushes_by = arm.context.value if arm.context is not None else arm.objective
        table.add_row(
            "–" if arm.score is None else str(rank),
            arm.arm,
            pushes_by + SCOPES[arm.scope],
            "–" if arm.focus is None else f"{arm.focus:.3f}",
            _score(arm.score),
        )
    return table


def critiquesprobe_table(critiques: CritiqueFigures) -> Table:
    share = _percent(critiques.share)
    table = probe_table(f"critiques of {critiques.rollouts} rollouts: {share} % validate", "outcome", "count", "%")
    for name, counts in (("validated", critiques.validated), ("refused", critiques.refused)):
        for outcome, count in counts.items():
            table.add_row(f"{name}: {outcome}", str(count), _percent(count / critiques.rollouts))
    return table


def remarks(report: ProbeReport) -> list[str]:
    """The tables' meaning, one line each: notes on arms, unknown figures, the recommendation and its caveat."""
    notes = [f"{arm.arm}: {arm.note}" for arm in report.arms if arm.note is not None]
    left_out = [
        f"{context.kind.value}: {context.rollouts} of {report.rollouts} rollouts; left out: "
        + ", ".join(f"{reason} {count}" for reason, count in context.left_out.items())
        for context in report.contexts
        if context.left_out
    ]
    if report.unusable:
        reasons = ", ".join(f"{reason} {count}" for reason, count in report.unusable.items())
        left_out.append(f"{sum(report.unusable.values())} rollouts cannot be used and are in no figure: {reasons}")
    if report.unlocated:
        left_out.append(
            f"of {report.unlocated} rollouts it is not known where they err: neither the critic nor data.checker gave "
            "a valid critique of them"
        )
    return [*notes, *left_out, recommendation(report.arms)]


def recommendation(arms: list[ArmFigures]) -> str:
    """The best arm, the arms that cannot be told from it, and the limits of the probe."""
    scored = [(arm.arm, arm.score) for arm in arms if arm.score is not None]
    if not scored or scored[0][1].value <= 0:
        return "no arm can be recommended: none has a score above 0"
    (best, score), *others = scored
    close = [name for name, other in others if other.upper >= score.lower and other.value > 0]
    beside = f" (not told apart from it: {', '.join(close)})" if close else ""
    return f"worth running first: {best}{beside}. Caveat: {CAVEAT}"
