"""How far the rewards of a comparison know their own chance of being right."""

from collections.abc import Sequence
from dataclasses import dataclass

from trueward.evaluate.comparison import PooledReliability, pooled_reliability
from trueward.report.curves import Shown
from trueward.report.figures import reliability_panels
from trueward.report.html import Section, Table
from trueward.report.keeper import Keeper
from trueward.report.numbers import Cell, interval_text

_MOST_PANELS = 6


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward, and the names of the methods that share it."""

    names: list[str]
    reliability: PooledReliability


def distinct_rewards(shown: Sequence[Shown]) -> list[Reward]:
    """Return each reward once: methods that share one have identical probabilities."""
    found: dict[object, list[Shown]] = {}
    for s in shown:
        key = tuple(
            (run.seed, tuple(run.probabilities), tuple(run.outcomes))
            for run in s.method.runs
            if run.probabilities
        )
        if key:
            found.setdefault(key, []).append(s)
    rewards = []
    for sharing in found.values():
        reliability = pooled_reliability(sharing[0].method)
        if reliability is not None:
            rewards.append(Reward(names=[s.name for s in sharing], reliability=reliability))
    return rewards


def reliability_section(keep: Keeper, rewards: Sequence[Reward]) -> Section | None:
    """Return a table of all rewards, and a panel for each of the first."""
    if not rewards:
        return None
    first = rewards[:_MOST_PANELS]
    curves = {_title_of(r.names): r.reliability.curve for r in first}
    remarks = {_title_of(r.names): _remark(r.reliability) for r in first}
    together = reliability_panels(curves, title="Reliability on held-out pairs", remarks=remarks)
    apart = {n: reliability_panels({"": c}, remarks={"": remarks[n]}) for n, c in curves.items()}
    rows: list[list[Cell]] = [
        [
            "; ".join(r.names),
            interval_text(r.reliability.accuracy),
            r.reliability.ece,
            r.reliability.brier,
            r.reliability.pairs,
        ]
        for r in rewards
    ]
    table = Table(
        columns=["methods with this reward", "accuracy", "ECE", "Brier score", "pairs"],
        rows=rows,
        caption="Each reward on the annotator's choices between held-out answers of the reference "
        "policy.",
        notes="Where the annotator errs, not even gold agrees with every choice. ± over seeds. ECE "
        "and Brier score are of all seeds' pairs together; a reward that says nothing has a Brier "
        "score of 0.25.",
    )
    caption = (
        "How often the first answer was preferred against the chance that the reward gave it; on "
        "the dashed diagonal a probability means what it says. Columns: how many pairs."
    )
    if len(rewards) > len(first):
        caption += f" The first {len(first)} of {len(rewards)} rewards; the others are in the table"
        caption += " alone."
    return Section(
        title="Reliability of the rewards",
        tables=[table],
        figures=[keep.panels("reliability", together, apart, caption)],
    )


def _remark(found: PooledReliability) -> str:
    return f"accuracy {found.accuracy.mean:.2f}\nECE {found.ece:.3f}"


def _title_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
