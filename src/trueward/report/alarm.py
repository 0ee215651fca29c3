"""The page of an alarm: its table over worlds, methods and seeds, and some runs drawn."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trueward.evaluate.alarm import (
    AlarmSummary,
    Calibrated,
    Outcome,
    WatchedRun,
    gold_by_place,
    summarise_outcomes,
)
from trueward.evaluate.comparison import Estimate
from trueward.report.figures import Curve, Mark, marked_figure
from trueward.report.html import Details, PanelsHtml, Section, Table, render_report
from trueward.report.keeper import Keeper
from trueward.report.numbers import Cell, decimal
from trueward.report.run import configuration_details, markdown, versions_line
from trueward.train.run_folder import write_text

Example = tuple[WatchedRun, Outcome]


def alarm_report(
    folder: str | Path,
    found: Mapping[str, Calibrated],
    judged: Sequence[Outcome],
    *,
    calibration: Sequence[Outcome],
    example: Sequence[Example],
    title: str,
    config_text: str,
    environment: Mapping[str, Any],
) -> Path:
    """Write `report.html`, `table.md`, `runs.md`, `outcomes.json` and `figures/`.

    Args:
        folder: Where to write.
        found: The alarm and its rivals, by world.
        judged: Of runs that the alarm was not calibrated on.
        calibration: Of those that it was.
        example: Runs of one seed, to be drawn.
        title: The page's heading.
        config_text: The configuration, shown verbatim.
        environment: Versions and device.

    Returns:
        The page's path.
    """
    root = Path(folder)
    tables = [
        when_table(judged, caption="When the alarm was raised, on runs it was not calibrated on."),
        gold_table(judged, caption="Gold where each rule stops, on runs it was not calibrated on."),
    ]
    runs = run_table(judged)
    own = gold_table(calibration, caption="The same on the calibration's own runs.")
    keep = Keeper(root / "figures")
    drawn = _drawn(keep, example)
    configuration = configuration_details(config_text, environment)
    page = render_report(
        title=title,
        lead=_lead(judged),
        sections=[
            Section(title="The alarm", text=_alarms(found)),
            Section(title="Results", tables=tables, figures=drawn),
            Section(
                title="Every run",
                details=[
                    Details(summary=f"The table of all {len(judged)} runs", table=runs),
                    Details(summary="The runs of the calibration", table=own),
                ],
            ),
            *([Section(title="Configuration", details=configuration)] if configuration else []),
        ],
        footer=versions_line(environment),
    )
    write_text(root / "table.md", "\n\n".join(markdown(t) for t in tables) + "\n")
    write_text(root / "runs.md", markdown(runs) + "\n")
    plain = {
        "calibrated": {world: asdict(one) for world, one in found.items()},
        "judged": [asdict(o) | {"at_peak": o.at_peak} for o in judged],
        "calibration": [asdict(o) for o in calibration],
    }
    write_text(root / "outcomes.json", json.dumps(plain, indent=1))
    target = root / "report.html"
    write_text(target, page)
    return target


# ---- tables ------------------------------------------------------------------------------------


def groups_of(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """Return the outcomes by world and method; after a world's methods, all learned together."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for world in dict.fromkeys(o.world for o in outcomes):
        own = [o for o in outcomes if o.world == world]
        for method in dict.fromkeys(o.method for o in own):
            found[world, method] = [o for o in own if o.method == method]
        learned = [o for o in own if not o.gold_is_reward]
        if len({o.method for o in learned}) > 1:
            found[world, "all learned rewards"] = learned
    learned = [o for o in outcomes if not o.gold_is_reward]
    gold = [o for o in outcomes if o.gold_is_reward]
    if len({o.world for o in outcomes}) > 1:
        found |= {("all worlds", "all learned rewards"): learned} if learned else {}
        found |= {("all worlds", "gold as reward"): gold} if gold else {}
    return found


def when_table(outcomes: Sequence[Outcome], *, caption: str = "") -> Table:
    """Return how often the alarm was raised, and where."""
    rows: list[list[Cell]] = []
    for (world, method), some in groups_of(outcomes).items():
        s = summarise_outcomes(some)
        whole = s.runs - s.falling
        rows.append(
            [
                world,
                method,
                s.runs,
                s.falling,
                f"{s.raised} of {s.falling}" if s.falling else None,
                f"{s.at_peak} of {s.falling}" if s.falling else None,
                f"{s.kept_at_peak} of {s.falling}" if s.falling else None,
                f"{s.early} of {s.falling}" if s.falling else None,
                f"{s.false} of {whole}" if whole else None,
            ]
        )
    columns = ["world", "reward", "runs", "gold falls", "raised", "within 20 %\nof the peak"]
    return Table(
        columns=[
            *columns,
            "its policy\nwithin 20 %",
            "earlier",
            "raised where gold\ndoes not fall",
        ],
        rows=rows,
        caption=caption,
        notes="Gold falls where it ends more than 0.25 below its smoothed peak, in standard "
        "deviations of the reference policy's answers. Its policy: the one that it goes back to.",
    )


def gold_table(outcomes: Sequence[Outcome], *, caption: str = "") -> Table:
    """Return gold at the stop of the alarm and of its rivals, with paired differences."""
    rows: list[list[Cell]] = []
    for (world, method), some in groups_of(outcomes).items():
        s: AlarmSummary = summarise_outcomes(some)
        row: list[Cell] = [world, method]
        for estimate in (s.gold_none, s.gold_alarm, s.gold_oracle, s.gold_budget, s.gold_fixed):
            row.append(_two(estimate))
        row += [_two(e) for e in (s.less_none, s.less_budget, s.less_fixed, s.less_oracle)]
        rows.append([*row, decimal(100 * s.gold_kept, 0)])
    columns = ["world", "reward", "no alarm", "alarm", "oracle", "KL budget", "fixed steps"]
    columns += [f"alarm less\n{name}" for name in ("no alarm", "KL budget", "fixed steps")]
    return Table(
        columns=[*columns, "alarm less\noracle", "gain kept, %"],
        rows=rows,
        caption=caption,
        notes="Gold of the policy that each rule leaves behind; ± is half of Student's 95 % "
        "interval over seeds, a seed's runs counted once by their mean; differences are paired. "
        "The oracle stops at the smoothed peak. KL budget and number of steps are those that kept "
        "the most gold on the calibration's runs. Gain kept: gain over the reference policy at "
        "the alarm's stop over the oracle's, in the mean.",
    )


def run_table(outcomes: Sequence[Outcome]) -> Table:
    """Return a row for each run."""
    rows: list[list[Cell]] = [
        [
            o.world,
            o.method,
            o.seed,
            o.peak if o.falls else "none",
            o.raised_at,
            "yes" if o.at_peak else None,
            o.kept,
            *(decimal(g, 2) for g in (o.gold_none, o.gold_alarm, o.gold_oracle)),
            *(decimal(g, 2) for g in (o.gold_budget, o.gold_fixed)),
            decimal(100 * o.gold_kept, 0) if o.gold_oracle - o.gold_start > 0.1 else None,
        ]
        for o in outcomes
    ]
    columns = ["world", "reward", "seed", "true peak", "alarm\nin step", "at the\npeak"]
    columns += ["policy\nof step", "gold,\nno alarm", "gold,\nalarm", "gold,\noracle"]
    return Table(
        columns=[*columns, "gold,\nKL budget", "gold,\nfixed steps", "gain\nkept, %"],
        rows=rows,
        caption="Every run: where gold peaks, when the alarm was raised, what was kept.",
        notes="Gain kept is left out where the oracle gains at most 0.1.",
    )


def _two(estimate: Estimate) -> Cell:
    text, half = decimal(estimate.mean, 2), decimal(estimate.half_width, 2)
    return text if half is None or text is None else f"{text} ± {half}"


# ---- figure and words --------------------------------------------------------------------------


def example_figure(example: Sequence[Example], *, title: str = "") -> Figure:
    """Draw each run's gold over its steps, with the peak, the alarm and the KL budget marked."""
    panels = {}
    for run, outcome in example:
        gold = gold_by_place(run).tolist()
        marks = [Mark(name="true peak", x=outcome.peak, style="dotted")] if outcome.falls else []
        if outcome.raised_at is not None:
            marks.append(Mark(name="alarm", x=outcome.raised_at - 1, style="solid"))
        if outcome.budget < run.steps:
            marks.append(Mark(name="KL budget", x=outcome.budget, style="dashed"))
        panels[run.method] = (Curve(name="gold", x=list(range(len(gold))), y=gold), marks)
    return marked_figure(panels, title=title, x_label="step", y_label="gold")


def _drawn(keep: Keeper, example: Sequence[Example]) -> list[PanelsHtml]:
    if not example:
        return []
    run = example[0][0]
    title = f"World {run.world}, seed {run.seed}"
    panels = {one[0].method: example_figure([one]) for one in example}
    caption = (
        f"Smoothed gold over the steps of seed {run.seed} in the world {run.world}, by the reward "
        "that was optimised. Dotted: the true peak, where gold falls; solid: where the alarm is "
        "raised; dashed: where the KL budget ends."
    )
    whole = example_figure(example, title=title)
    return [keep.panels("gold_and_alarm", whole, panels, caption)]


def _alarms(found: Mapping[str, Calibrated]) -> str:
    """Say what each alarm is, and which worlds have it."""
    texts: dict[str, list[str]] = {}
    for world, one in found.items():
        texts.setdefault(_described(one), []).append(world)
    if len(texts) == 1:
        return next(iter(texts))
    return "\n\n".join(f"In {', '.join(worlds)}: {text}" for text, worlds in texts.items())


def _described(found: Calibrated) -> str:
    a = found.alarm
    terms = " + ".join(f"{w:g} x {name}" for name, w in a.weights.items())
    how = "the score" if a.slack is None else f"its cumulative sum above a slack of {a.slack:g}"
    back = "" if a.rewind == 1 else f", and goes back to {a.rewind:g} of the steps before it"
    return (
        f"Of {found.candidates:,} alarms that were tried, the one that kept the most gold on the "
        f"calibration's runs looks at {terms}, counted from their first {a.window} steps in "
        f"standard deviations. It is raised where {how} exceeds {a.threshold:.4g} in {a.patience} "
        f"step(s) running{back}. There it keeps {found.gold:.2f} of gold and is raised in "
        f"{100 * found.false_alarms:.0f} % of the runs with gold as reward; the best KL budget "
        f"({found.kl_budget:.3g} nats) keeps {found.budget_gold:.2f}, the best number of steps "
        f"({found.fixed_steps}) {found.fixed_gold:.2f}."
    )


def _lead(judged: Sequence[Outcome]) -> str:
    learned = [o for o in judged if not o.gold_is_reward]
    gold = [o for o in judged if o.gold_is_reward]
    s = summarise_outcomes(learned)
    cried = sum(o.raised_at is not None for o in gold)
    return (
        f"On {len(learned)} runs of learned rewards that it was not calibrated on, gold falls in "
        f"{s.falling}; the alarm is raised in {s.raised} of these, within 20 % of the true peak in "
        f"{s.at_peak}. Of {len(gold)} runs with gold as reward it stops {cried}. Gold stands at "
        f"{s.gold_alarm.mean:.2f} where it stops, at {s.gold_none.mean:.2f} without an alarm, at "
        f"{s.gold_oracle.mean:.2f} with an oracle and at {s.gold_budget.mean:.2f} with the best KL "
        "budget."
    )
