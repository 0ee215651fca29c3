"""The tables of a comparison: what each method came to, and the laws of their curves."""

import math
from collections.abc import Mapping, Sequence

from trueward.evaluate.comparison import MOST_RMS, Estimate, MethodRuns
from trueward.report.curves import Shown, capital, kl_words
from trueward.report.figures import several_dots_figure
from trueward.report.html import FigureHtml, Section, Table
from trueward.report.keeper import Keeper
from trueward.report.numbers import NO_FIT, Cell, decimal, interval_text


def results_section(
    groups: Mapping[str, Sequence[Shown]],
    methods: Sequence[MethodRuns],
    baseline: str,
    notes: str,
) -> Section:
    """Return a table for each family, whose places and KLs mean the same."""
    rows = {name: [_row(s) for s in group] for name, group in groups.items()}
    silent = _silent([row for own in rows.values() for row in own])
    tables: list[Table] = []
    for name, group in groups.items():
        remarks = _family_remarks(group, baseline)
        if not tables:
            remarks = [*_general_remarks(groups, methods), *remarks]
        own = rows[name]
        held = [c for c in own[0] if c not in silent and any(r[c] is not None for r in own)]
        place = group[0].summary.place_name.replace("beta", "β")
        seeds = _seeds_text([s.summary.seeds for s in group])
        tables.append(
            Table(
                columns=[column.format(place=place) for column in held],
                rows=[[row[column] for column in held] for row in own],
                caption=f"{capital(name)}: gold reward and what it cost, {seeds}.",
                notes=" ".join(remarks),
            )
        )
    return Section(title="Results", text=notes, tables=tables)


def fits_section(shown: Sequence[Shown]) -> Section | None:
    """Return the laws' parameters, with the peaks that they predict where they describe a curve."""
    rows: list[list[Cell]] = []
    for s in shown:
        if s.fit is None:
            continue
        law, fits = s.fit.law, s.fit.describes
        rows.append(
            [
                s.name,
                law.alpha,
                law.beta,
                decimal(law.peak_kl, 1) if fits else NO_FIT,
                decimal(s.fit.peak_gold, 2) if fits else NO_FIT,
                decimal(s.summary.kl_peak, 1),
                decimal(s.summary.gold_peak.mean, 2),
                law.rms_error,
                decimal(100 * law.rms_error / s.fit.gold_range, 0) if s.fit.gold_range else None,
            ]
        )
    if not rows:
        return None
    table = Table(
        columns=[
            "method",
            "α",
            "β",
            "predicted\npeak KL",
            "predicted\npeak gold",
            "observed\npeak KL",
            "observed\npeak gold",
            "rms\nerror",
            "in % of\nthe range",
        ],
        rows=rows,
        caption="The laws' parameters, fitted to the mean curves by least squares.",
        notes="A law describes a curve if it rises and falls (α and β above 0) and its rms error "
        f"is at most {100 * MOST_RMS:.0f} % of the curve's range of gold; otherwise there is no "
        "fit, and no peak. A predicted peak far beyond the last KL is an extrapolation.",
    )
    return Section(title="Fitted laws", tables=[table])


def _row(one: Shown) -> dict[str, Cell]:
    """Return a method's cells by their columns."""
    found = one.summary
    drop = Estimate(mean=math.nan) if found.peaks_at_end else found.drop  # 0 by definition there
    return {
        "method": one.name,
        "gold\nat the end": interval_text(found.gold_end),
        "difference to\nthe baseline": interval_text(found.less_baseline),
        "gold at\nits peak": interval_text(found.gold_peak),
        "peak\nat {place}": f"{found.peak_place:g}",
        "drop": interval_text(drop),
        "wins against\nthe reference": _percent_text(found.win_rate_end),
        "KL\nat end": decimal(found.kl_end, 1),
        "proxy\nat end": decimal(found.proxy_end.mean, 2),
        "words": decimal(found.length_end, 1),
        "seconds\na cell": decimal(found.seconds_mean, 0 if found.seconds_mean >= 10 else 1),
    }


def agreements_section(keep: Keeper, shown: Sequence[Shown]) -> Section | None:
    """Return what each reward tells of whose answers; None where no reward was refined."""
    known = [s for s in shown if s.summary.agreements]
    if not known:
        return None
    whose = list(dict.fromkeys(name for s in known for name in s.summary.agreements))
    less = any(s.summary.agreements_less_baseline for s in known)
    columns, rows = ["reward"], [[s.name] for s in known]
    cells: list[list[Cell]] = [list(row) for row in rows]
    for name in whose:
        columns.append(f"on answers of\n{_WHOSE[name]}")
        for row, s in zip(cells, known, strict=True):
            row.append(_percent_text(s.summary.agreements.get(name)))
        if less:
            columns.append("less the\nbaseline's")
            for row, s in zip(cells, known, strict=True):
                row.append(_percent_text(s.summary.agreements_less_baseline.get(name)))
    table = Table(
        columns=columns,
        rows=cells,
        caption="Per cent of pairs of answers to one held-out prompt that a reward orders as gold.",
        notes="± is half of the 95 % interval over seeds (Student's t); differences are paired. "
        "Pairs of equal gold are left out, tied rewards count half.",
    )
    return Section(
        title="Whose answers a reward can tell apart",
        text="A reward learns from the reference policy's answers. The moved policy was optimised "
        "a little against the first reward; its answers are what refinement learns from. The own "
        "policy is the one that was optimised against this very reward to the end.",
        figures=[_agreements_figure(keep, known, whose)],
        tables=[table],
    )


def _agreements_figure(keep: Keeper, known: Sequence[Shown], whose: Sequence[str]) -> FigureHtml:
    shares = {
        f"of {_WHOSE[name]}": {
            s.name: s.summary.agreements[name] for s in known if name in s.summary.agreements
        }
        for name in whose
    }
    figure = several_dots_figure(
        shares,
        title="What a reward still tells of the policy's answers",
        x_label="share of pairs ordered as gold orders them",
        middle=0.5,
    )
    words = "At a half (the line) a reward tells nothing. Line: 95 % interval over seeds."
    return keep.figure("agreement_by_policy", figure, words)


_WHOSE = {"reference": "the reference", "moved": "the moved policy", "own": "its own policy"}


def _percent_text(share: Estimate | None) -> Cell:
    """Return a share in per cent, with its interval; None where it is not known."""
    if share is None or math.isnan(share.mean):
        return None
    text, half = decimal(100 * share.mean, 1), decimal(100 * share.half_width, 1)
    return text if half is None else f"{text} ± {half}"


def _silent(rows: Sequence[Mapping[str, Cell]]) -> set[str]:
    """Return which of the columns beside the point are the same in every row of every table."""
    aside = ("words", "seconds\na cell")
    return {c for c in aside if len(rows) > 1 and len({row[c] for row in rows}) == 1}


def _general_remarks(
    groups: Mapping[str, Sequence[Shown]], methods: Sequence[MethodRuns]
) -> list[str]:
    shown = [s for group in groups.values() for s in group]
    found = [
        "± is half of the 95 % interval over seeds (Student's t).",
        "The peak is that of the mean curve; every seed is read at that one place.",
    ]
    if any(s.summary.peaks_at_end for s in shown):
        found.append("Where it is the last place there is no drop, and gold may yet rise.")
    names = {s.method.name for s in shown}
    missing = [m.label or m.name for m in methods if m.name not in names]
    if missing:
        found.append(f"Without runs: {', '.join(missing)}.")
    return found


def _family_remarks(group: Sequence[Shown], baseline: str) -> list[str]:
    found = []
    first = group[0]
    if len(group) > 1 and first.method.name == baseline:
        found.append(f"The baseline is {first.name}; differences to it and drops are paired.")
    elif len(group) > 1:
        found.append(
            f"The baseline is not among these: {first.name} serves in its place; differences to it "
            "and drops are paired."
        )
    single = [s.name for s in group if s.summary.gold_end.over_prompts]
    if single:
        found.append(
            f"With one seed ({', '.join(single)}) there is no interval over seeds: the ± of its "
            "gold is over prompts alone."
        )
    kl = kl_words(group)
    if kl:
        found.append(f"KL in nats a completion ({kl}).")
    return found


def _seeds_text(seeds: Sequence[int]) -> str:
    low, high = min(seeds), max(seeds)
    if low != high:
        return f"means over {low} to {high} seeds"
    return f"means over {high} seeds" if high > 1 else "one seed"
