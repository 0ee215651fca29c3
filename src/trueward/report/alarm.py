"""The page of an alarm: its tables over rules, worlds, methods and seeds, and some runs drawn."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trueward.evaluate.alarm import (
    Aim,
    Found,
    Outcome,
    WatchedRun,
    gold_by_place,
    halves_agree,
    less,
    over_seeds,
    summarise_outcomes,
    true_peak,
)
from trueward.evaluate.comparison import Estimate
from trueward.report.figures import Curve, Mark, marked_figure, save_figure, settle_layout
from trueward.report.html import Details, PanelsHtml, Section, Table, render_report
from trueward.report.keeper import Keeper
from trueward.report.numbers import Cell, decimal
from trueward.report.run import configuration_details, markdown, versions_line
from trueward.train.run_folder import write_text

ALARM, BUDGET, FIXED = "alarm", "KL budget", "fixed steps"  # kinds of rules
ALONE = "no bound"  # on false alarms, of a rival
Judged = Mapping[Aim, Mapping[str, Sequence[Outcome]]]  # by aim and kind of rule


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made the runs of a world."""

    world: str
    command: str
    seeds: Sequence[int]
    runs: int
    seconds: float  # by the clocks of all stages, added up
    commit: str
    date: str


def alarm_report(
    folder: str | Path,
    rules: Mapping[str, Mapping[Aim, Mapping[str, Found]]],
    runs: Sequence[WatchedRun],
    judged: Judged,
    *,
    calibration: Judged,
    max_false_alarms: float,
    apart: str,
    example: Sequence[WatchedRun],
    title: str,
    config_text: str,
    environment: Mapping[str, Any],
    markdown_page: Path | None = None,
    made: Sequence[Provenance] = (),
) -> Path:
    """Write `report.html`, `table.md`, `runs.md`, `outcomes.json` and `figures/`.

    Args:
        folder: Where to write.
        rules: The alarms and their rivals, by world.
        runs: That no rule was calibrated on.
        judged: What the rules make of them.
        calibration: What they make of those that they were calibrated on.
        max_false_alarms: The bound of the calibration.
        apart: A world that is of another kind, and in no row with others.
        example: Runs of one seed, to be drawn.
        title: The page's heading.
        config_text: The configuration, shown verbatim.
        environment: Versions and device.
        markdown_page: Where to write the same in Markdown; None for nowhere.
        made: What made the runs, for that page.

    Returns:
        The report's path.
    """
    root = Path(folder)
    tables = _tables(runs, judged, calibration, apart)
    lead = _lead(_of_worlds(judged, apart, inside=True))
    alarms = _alarms(rules, calibration, max_false_alarms)
    configuration = configuration_details(config_text, environment)
    drawn = _figures(Keeper(root / "figures"), example, judged)
    elsewhere = Section(title=f"The world {apart}", text=_APART, tables=tables.apart)
    summary = f"The table of all {len(tables.every.rows)} runs"
    page = render_report(
        title=title,
        lead=lead,
        sections=[
            Section(title="The alarm", text=alarms),
            Section(title="Results", tables=tables.results, figures=drawn),
            *([elsewhere] if tables.apart else []),
            Section(
                title="Every run",
                details=[
                    Details(summary=summary, table=tables.every),
                    Details(summary="The runs of the calibration", table=tables.own),
                ],
            ),
            *([Section(title="Configuration", details=configuration)] if configuration else []),
        ],
        footer=versions_line(environment),
    )
    target = root / "report.html"
    write_text(target, page)
    texts = [*map(markdown, tables.results), *([_APART] if tables.apart else [])]
    texts += map(markdown, tables.apart)
    write_text(root / "table.md", "\n\n".join(texts) + "\n")
    write_text(root / "runs.md", markdown(tables.every) + "\n")
    plain = {
        "rules": {
            world: {aim: {k: asdict(f) for k, f in found.items()} for aim, found in some.items()}
            for world, some in rules.items()
        },
        "judged": _plain(judged),
        "calibration": _plain(calibration),
    }
    write_text(root / "outcomes.json", json.dumps(plain, indent=1))
    if markdown_page is not None:
        parts = [f"# {title}", lead, alarms]
        if example:
            parts.append(_drawn_beside(markdown_page, example, judged))
        parts += ["## Results", *map(_captioned, tables.results)]
        if tables.apart:
            parts += [f"## The world {apart}\n{_APART}", *map(_captioned, tables.apart)]
        parts += ["## Every run", _captioned(tables.every), _captioned(tables.own)]
        parts += ["## What made the runs", _captioned(_provenance_table(made))] if made else []
        markdown_page.parent.mkdir(parents=True, exist_ok=True)
        write_text(markdown_page, "\n\n".join(parts) + "\n")
    return target


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """All tables of a report; those of the world apart are none where it is not there."""

    results: list[Table]
    apart: list[Table]
    every: Table  # a row for each run
    own: Table  # the rules on the runs that they were calibrated on


def _tables(runs: Sequence[WatchedRun], judged: Judged, calibration: Judged, apart: str) -> _Tables:
    inside = _of_worlds(judged, apart, inside=True)
    outside = _of_worlds(judged, apart, inside=False)
    own = _of_worlds(calibration, apart, inside=True)
    together = [r for r in runs if r.world != apart]
    unseen = "on runs that no rule was calibrated on."
    others = []
    if outside["warn"][ALARM]:
        others = [
            rules_table(outside, [], caption=f"Every rule in the world {apart}."),
            when_table(outside["warn"][ALARM], caption=f"When the alarm warns in {apart}."),
            gold_table(outside["stop"], caption=f"Gold where each rule stops in {apart}."),
        ]
    return _Tables(
        results=[
            rules_table(inside, together, caption=f"Every rule, {unseen}"),
            when_table(inside["warn"][ALARM], caption=f"When the alarm warns, {unseen}"),
            gold_table(inside["stop"], caption=f"Gold where each rule stops, {unseen}"),
        ],
        apart=others,
        every=run_table(judged),
        own=rules_table(own, [], caption="Every rule on its own runs."),
    )


def _drawn_beside(page: Path, example: Sequence[WatchedRun], judged: Judged) -> str:
    """Draw the example into `figures` beside a page in Markdown; return what shows it there."""
    drawing = example_figure(example, judged, title=_example_title(example))
    _, pdf = save_figure(settle_layout(drawing), page.parent / "figures" / "alarm")
    pdf.unlink()  # of no use there
    return f"![Gold, its peak and the alarm](figures/alarm.png)\n\n{_MARKS}"


_APART = (
    "Tables of another kind, in no row with the other worlds: the KL and the log-probability are "
    "of one response among all, where elsewhere the KL is summed over a completion's tokens and "
    "the log-probability is of a token, so that rules in these units mean another thing; there are "
    "neither states nor lengths."
)


def _of_worlds(judged: Judged, apart: str, *, inside: bool) -> Judged:
    return {
        aim: {
            kind: [o for o in some if (o.world != apart) == inside] for kind, some in found.items()
        }
        for aim, found in judged.items()
    }


def _plain(judged: Judged) -> dict[str, Any]:
    return {
        aim: {
            kind: [asdict(o) | {"timing": o.timing} for o in some] for kind, some in found.items()
        }
        for aim, found in judged.items()
    }


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
    learned, gold = _learned(outcomes), _gold(outcomes)
    if len({o.world for o in outcomes}) > 1:
        found |= {("all embedded worlds", "all learned rewards"): learned} if learned else {}
        found |= {("all embedded worlds", "gold as reward"): gold} if gold else {}
    return found


def rules_table(judged: Judged, runs: Sequence[WatchedRun], *, caption: str = "") -> Table:
    """Return a row for each kind of rule: over all learned rewards, and all with gold as reward.

    Args:
        judged: Of worlds that belong together.
        runs: Those judged, for what half of the answers hit; none for no such row.
        caption: Of the table.
    """
    rows: list[list[Cell]] = []
    stops = judged["stop"]
    for kind, warned in judged["warn"].items():
        s, stopped = summarise_outcomes(_learned(warned)), stops[kind]
        if not s.runs:
            continue
        t = s.timings
        difference = less(_learned(stopped), _learned(stops[ALARM]))
        rows.append(
            [
                kind,
                *(f"{t[one]} of {s.falling}" for one in ("early", "hit", "late", "never")),
                _share(s.hit_share),
                _share(s.near_share),
                _raised(_gold(warned)),
                _two(summarise_outcomes(_learned(stopped)).gold_kept),
                None if kind == ALARM else _two(difference),
                _raised(_gold(stopped)),
            ]
        )
    falling = [r for r in runs if r.halves and not r.gold_is_reward and true_peak(r).falls]
    if falling:
        place = _share(over_seeds(falling, lambda r: halves_agree(r).place))
        gold = _share(over_seeds(falling, lambda r: halves_agree(r).gold))
        rows.append(["gold of half the answers", *[None] * 4, place, gold, *[None] * 4])
    columns = ["rule", "early", "within 20 %\nof the peak", "late", "never", "within 20 %,\n%"]
    columns += ["within 0.15\nof its gold, %", "gold runs\nwarned", "gold at\nthe stop"]
    return Table(
        columns=[*columns, "less the\nalarm's", "gold runs\nstopped"],
        rows=rows,
        caption=caption,
        notes="Each rule was chosen twice on the same runs: to warn (the columns up to the gold "
        "runs warned) and to stop. Hits are counted among the runs of learned rewards whose gold "
        "falls; a share in % is a mean over seeds, a seed's runs counted once by their share, ± "
        "half of Student's 95 % interval, which says little "
        "of two to four seeds." + (_HALVES if falling else ""),
    )


_HALVES = (
    " Gold of half the answers: what an alarm would hit that knows gold from the first or from the "
    "second answer to each prompt, judged by the other."
)


def when_table(outcomes: Sequence[Outcome], *, caption: str = "") -> Table:
    """Return when an alarm was raised, and how often at the peak."""
    rows: list[list[Cell]] = []
    for (world, method), some in groups_of(outcomes).items():
        s = summarise_outcomes(some)
        whole, n = s.runs - s.falling, s.falling
        times = [s.timings[one] for one in ("early", "hit", "late", "never")]
        rows.append(
            [
                *(world, method, s.runs, n),
                *(f"{count} of {n}" if n else None for count in times),
                _share(s.hit_share),
                f"{s.near_in_gold} of {n}" if n else None,
                f"{s.false} of {whole}" if whole else None,
                _share(s.false_share),
            ]
        )
    columns = ["world", "reward", "runs", "gold falls", "early", "within 20 %\nof the peak", "late"]
    columns += [
        "never",
        "within 20 %,\n%",
        "within 0.15\nof its gold",
        "raised where gold\ndoes not fall",
    ]
    return Table(
        columns=[*columns, "the same,\n%"],
        rows=rows,
        caption=caption,
        notes="Gold falls where it ends more than 0.25 below its smoothed peak, in standard "
        "deviations of the reference policy's answers. A share in % is a mean over seeds, a seed's "
        "runs counted once by their share, ± half of Student's 95 % interval, which says little of "
        "two to four seeds.",
    )


def gold_table(stops: Mapping[str, Sequence[Outcome]], *, caption: str = "") -> Table:
    """Return gold at the stop of the alarm and of its rivals, with paired differences.

    Args:
        stops: Outcomes by kind of rule.
        caption: Of the table.
    """
    rivals = [kind for kind in (BUDGET, f"{BUDGET}, {ALONE}", FIXED) if kind in stops]
    theirs = [groups_of(stops[kind]) for kind in rivals]
    rows: list[list[Cell]] = []
    for key, some in groups_of(stops[ALARM]).items():
        s = summarise_outcomes(some)
        rows.append(
            [
                *key,
                *map(_two, (s.gold_none, s.gold_kept, s.gold_oracle)),
                *(_two(summarise_outcomes(one.get(key, [])).gold_kept) for one in theirs),
                _two(s.less_none),
                *(_two(less(some, one.get(key, []))) for one in theirs),
                _two(s.less_oracle),
                decimal(100 * s.gain_kept, 0),
            ]
        )
    columns = ["world", "reward", "no alarm", "alarm", "oracle", *(_broken(r) for r in rivals)]
    columns += [f"alarm less\n{name}" for name in ("no alarm", *rivals, "oracle")]
    return Table(
        columns=[*columns, "gain kept, %"],
        rows=rows,
        caption=caption,
        notes="Gold of the policy that each rule leaves behind; ± is half of Student's 95 % "
        "interval over seeds, a seed's runs counted once by their mean; differences are paired. "
        "The oracle stops at the smoothed peak. KL budgets and number of steps are those that kept "
        "the most gold on the calibration's runs; where it says no bound, and for the steps, "
        "whatever they stop of those with gold as reward. Gain kept: gain over the reference "
        "policy at the alarm's stop over the oracle's, in the mean.",
    )


def run_table(judged: Judged) -> Table:
    """Return a row for each run."""
    stops = {
        kind: {(o.world, o.method, o.seed): o for o in some}
        for kind, some in judged["stop"].items()
        if kind in (ALARM, BUDGET, f"{BUDGET}, {ALONE}", FIXED)
    }
    rows: list[list[Cell]] = []
    for o in judged["warn"][ALARM]:
        key = (o.world, o.method, o.seed)
        stop = stops[ALARM][key]
        gold = [some[key].gold_kept if key in some else math.nan for some in stops.values()]
        rows.append(
            [
                *key,
                o.peak if o.falls else "none",
                *(o.raised_at, o.timing, "yes" if o.near_in_gold else None),
                *(stop.raised_at, stop.kept),
                *(decimal(g, 2) for g in (o.gold_none, *gold, o.gold_oracle)),
                decimal(100 * stop.gain_kept, 0) if o.gold_oracle - o.gold_start > 0.1 else None,
            ]
        )
    columns = ["world", "reward", "seed", "true peak", "warns\nin step", "timing", "near\nin gold"]
    columns += ["stops\nin step", "policy\nof step", "gold,\nno alarm"]
    columns += [f"gold,\n{kind}" for kind in stops]
    return Table(
        columns=[*columns, "gold,\noracle", "gain\nkept, %"],
        rows=rows,
        caption="Every run: where gold peaks, when the alarm warned and stopped, what was kept.",
        notes="Gain kept is left out where the oracle gains at most 0.1.",
    )


def _learned(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [o for o in outcomes if not o.gold_is_reward]


def _gold(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [o for o in outcomes if o.gold_is_reward]


def _raised(outcomes: Sequence[Outcome]) -> Cell:
    raised = sum(o.raised_at is not None for o in outcomes)
    return f"{raised} of {len(outcomes)}" if outcomes else None


def _share(estimate: Estimate) -> Cell:
    text, half = decimal(100 * estimate.mean, 0), decimal(100 * estimate.half_width, 0)
    return text if half is None or text is None else f"{text} ± {half}"


def _broken(name: str) -> str:
    return name.replace(", ", ",\n")


def _two(estimate: Estimate) -> Cell:
    text, half = decimal(estimate.mean, 2), decimal(estimate.half_width, 2)
    return text if half is None or text is None else f"{text} ± {half}"


# ---- figure and words --------------------------------------------------------------------------


def example_figure(example: Sequence[WatchedRun], judged: Judged, *, title: str = "") -> Figure:
    """Draw each run's gold over its steps; mark peak, warning, and the policy of the stop."""
    panels = {}
    for run in example:
        gold = gold_by_place(run).tolist()
        warned, stopped = (
            next(o for o in judged[aim][ALARM] if _same(o, run)) for aim in ("warn", "stop")
        )
        marks = [Mark(name="true peak", x=warned.peak, style="dotted")] if warned.falls else []
        if warned.raised_at is not None:
            marks.append(Mark(name="alarm", x=warned.raised_at - 1, style="solid"))
        if stopped.raised_at is not None:
            marks.append(Mark(name="goes back to", x=stopped.kept, style="dashed"))
        panels[run.method] = (Curve(name="gold", x=list(range(len(gold))), y=gold), marks)
    return marked_figure(panels, title=title, x_label="step", y_label="gold")


def _same(o: Outcome, run: WatchedRun) -> bool:
    return (o.world, o.method, o.seed) == (run.world, run.method, run.seed)


def _captioned(table: Table) -> str:
    """Return a table in Markdown with its caption and its notes."""
    return "\n\n".join(part for part in (table.caption, markdown(table), table.notes) if part)


_MARKS = (
    "Dotted: the true peak, where gold falls; solid: where the alarm warns; dashed: the policy "
    "that an alarm which stops goes back to."
)


def _example_title(example: Sequence[WatchedRun]) -> str:
    return f"World {example[0].world}, seed {example[0].seed}"


def _provenance_table(made: Sequence[Provenance]) -> Table:
    rows: list[list[Cell]] = [
        [
            one.world,
            one.command,
            _seeds(one.seeds),
            one.runs,
            decimal(one.seconds / 60, 0),
            one.commit,
            one.date,
        ]
        for one in made
    ]
    columns = ["world", "command", "seeds", "runs", "minutes, stages\nadded up", "commit", "date"]
    return Table(columns=columns, rows=rows, caption="The stored runs.")


def _seeds(seeds: Sequence[int]) -> str:
    """Write 100 to 103, 200 to 209."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)


def _figures(keep: Keeper, example: Sequence[WatchedRun], judged: Judged) -> list[PanelsHtml]:
    if not example:
        return []
    run = example[0]
    title = _example_title(example)
    panels = {one.method: example_figure([one], judged) for one in example}
    caption = (
        f"Smoothed gold over the steps of seed {run.seed} in the world {run.world}, by the reward "
        f"that was optimised. {_MARKS}"
    )
    whole = example_figure(example, judged, title=title)
    return [keep.panels("gold_and_alarm", whole, panels, caption)]


def _alarms(
    rules: Mapping[str, Mapping[Aim, Mapping[str, Found]]], calibration: Judged, bound: float
) -> str:
    """Say what each alarm is, which worlds have it, and what the bound means."""
    texts: dict[str, list[str]] = {}
    for world, found in rules.items():
        text = " ".join(_described(aim, one[ALARM]) for aim, one in found.items())
        texts.setdefault(text, []).append(world)
    several = len(texts) > 1
    paragraphs = [
        (f"In {', '.join(worlds)}: " if several else "") + text for text, worlds in texts.items()
    ]
    gold = len(_gold(calibration["warn"][ALARM]))
    allowed = math.floor(bound * gold) or "none"
    paragraphs.append(
        f"Runs with gold as reward in the calibration: {gold}. A bound of {100 * bound:g} % on "
        f"false alarms allows {allowed} of them."
    )
    return "\n\n".join(paragraphs)


_UNITS = {
    "window": "in standard deviations of these",
    "differences": "in standard deviations of these by their differences",
    "floor": "in units of the calibration's runs",
    "raw": "in its own unit",
}


def _described(aim: Aim, found: Found) -> str:
    a = found.rule
    if isinstance(a, int):
        return f"To {aim}: {a} steps."
    terms = " + ".join(f"{w:g} x {name}" for name, w in a.weights.items())
    how = "the score" if a.slack is None else f"its cumulative sum above a slack of {a.slack:g}"
    back = "" if a.rewind == 1 else f", and goes back to {a.rewind:g} of the steps before it"
    worth = f"keeps {found.worth:.2f} of gold"
    if aim == "warn":
        worth = f"is within 20 % of the true peak in {100 * found.worth:.0f} % where gold falls"
    return (
        f"To {aim}: of {found.candidates:,} alarms that were tried on the calibration's runs, the "
        f"best looks at {terms}, counted from the first {a.window} steps {_UNITS[a.unit]}. It is "
        f"raised where {how} exceeds {a.threshold:.4g} in {a.patience} step(s) running{back}. "
        f"On the calibration's runs it {worth}, and is raised in {100 * found.false_alarms:.0f} % "
        "of those with gold as reward."
    )


def _lead(judged: Judged) -> str:
    """Say what the alarms do in the worlds that belong together."""
    warned, stopped = judged["warn"][ALARM], judged["stop"][ALARM]
    if not warned:
        return ""
    s, g = summarise_outcomes(_learned(warned)), summarise_outcomes(_learned(stopped))
    t = s.timings
    sound = _raised(_gold(warned))
    wolf = f"With gold as reward it warns in {sound}. " if sound else ""
    return (
        f"On {s.runs} runs of learned rewards that it was not calibrated on, gold falls in "
        f"{s.falling}: the alarm warns within 20 % of the true peak in {t['hit']} of these, early "
        f"in {t['early']}, late in {t['late']}, never in {t['never']}. {wolf}"
        f"The alarm that stops leaves gold at {g.gold_kept.mean:.2f}; without one it ends at "
        f"{g.gold_none.mean:.2f}, with an oracle at {g.gold_oracle.mean:.2f}."
    )
