"""The report of a run's folder, or of a pipeline's with a folder for each stage."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from trueward.data.sources import DataError
from trueward.evaluate.shift import ShiftAccuracy, ShiftDifference, ShiftTable
from trueward.report.figures import (
    KL_LABEL,
    Curve,
    Scale,
    curve_figure,
    overoptimization_figure,
)
from trueward.report.html import (
    Completion,
    Details,
    FigureHtml,
    SampleRow,
    Section,
    Table,
    render_report,
)
from trueward.report.numbers import Cell, column_decimals, format_number, is_number_column
from trueward.report.shift import shift_section
from trueward.report.svg import to_svg
from trueward.train.run_folder import write_text

_RUN_FILES = ("summary.json", "config.yaml", "metrics.jsonl")
_RESULT_FILES = ("table.json", "curves.json", "samples.json")
_SMALL = (3.6, 2.4)  # inches of a metric's figure
_MOST_POINTS = 300  # of one drawn line: more cannot be told apart, and make a heavy page


def report_run(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a run, a pipeline or a comparison; return where.

    Beside what every run writes (`summary.json`, `config.yaml`, `environment.json`,
    `metrics.jsonl`), these are shown where they exist:
    `table.json`: `{columns, rows, caption, notes}`, or a list of such tables;
    `curves.json`: `{title: [curve, ...]}`, a curve as the fields of `Curve`, null for NaN; or
    `{title: {curves, x_label, y_label, x_scale, caption}}`;
    `samples.json`: `[{prompt, completions: [{text, label, scores}]}]`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give the --output_dir of a run.")
    runs = [_read_run(path, root) for path in _run_folders(root)]
    if not runs:
        raise DataError(
            f"{root} holds no run: there is no summary.json, config.yaml or metrics.jsonl in it or "
            "in its folders; give the --output_dir of a run."
        )
    own = runs[0] if runs[0].path == root else None
    stages = [run for run in runs if run is not own]
    page = render_report(
        title=_title(root, own),
        lead=_lead(own, stages),
        sections=list(_sections(own, stages)),
        footer=versions_line((own or stages[0]).environment),
    )
    target = root / "report.html"
    write_text(target, page)
    return target


def rich_table(table: Table) -> RichTable:
    """Return the table for the console, with the report's alignment and number format."""
    drawn = RichTable(
        title=table.caption or None,
        caption=table.notes or None,
        title_justify="left",
        caption_justify="left",
    )
    by_column = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    for name, cells in zip(table.columns, by_column, strict=True):
        drawn.add_column(Text(name), justify="right" if is_number_column(cells) else "left")
    decimals = [column_decimals(cells) for cells in by_column]
    for row in table.rows:
        # As Text, so that [brackets] in a name are not taken for markup.
        drawn.add_row(*(Text(format_number(c, d)) for c, d in zip(row, decimals, strict=True)))
    return drawn


def configuration_details(config: str, environment: Mapping[str, Any]) -> list[Details]:
    """Return `config.yaml` and `environment.json` to be opened; what is empty is left out."""
    found = []
    if config:
        found.append(Details(summary="config.yaml", text=config.rstrip()))
    if environment:
        text = "\n".join(f"{key}: {value}" for key, value in environment.items())
        found.append(Details(summary="environment.json", text=text))
    return found


def versions_line(environment: Mapping[str, Any]) -> str:
    """Return what a run was made with, from its `environment.json`: a page's last line."""
    revision = environment.get("revision")
    known = [
        f"{name} {environment[name]}"
        for name in ("trueward", "torch", "transformers", "python")
        if environment.get(name)
    ]
    if revision:
        known.insert(1, f"revision {str(revision)[:10]}")
    return ", ".join([*known, *([str(environment["device"])] if "device" in environment else [])])


# --- reading ---


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one folder says; `name` is its path within the reported folder, "." for that itself."""

    path: Path
    name: str
    summary: Mapping[str, Any] | None  # None: not finished
    config: str
    environment: Mapping[str, Any]
    series: Mapping[str, Mapping[str, list[tuple[float, float]]]]  # stage, metric, (step, value)
    unread: list[int]  # lines of metrics.jsonl


def _run_folders(root: Path) -> list[Path]:
    """Return the folder and those below it that hold a run, parents first, in order of name."""
    found = [root] if any((root / n).is_file() for n in _RUN_FILES + _RESULT_FILES) else []
    for child in sorted(root.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith((".", "check")):
            found += _run_folders(child)
    return found


def _read_run(path: Path, root: Path) -> _Run:
    series, unread = _read_metrics(path / "metrics.jsonl")
    config = path / "config.yaml"
    return _Run(
        path=path,
        name=path.relative_to(root).as_posix(),
        summary=_read_object(path / "summary.json"),
        config=config.read_text("utf-8", errors="replace") if config.is_file() else "",
        environment=_read_object(path / "environment.json") or {},
        series=series,
        unread=unread,
    )


def _read_metrics(
    file: Path,
) -> tuple[dict[str, dict[str, list[tuple[float, float]]]], list[int]]:
    """Return the numbers by stage and metric, and the lines that are no record of a step."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    unread: list[int] = []
    if not file.is_file():
        return series, unread
    lines = file.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = float(row.pop("step"))
            stage = str(row.pop("stage", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            unread.append(number)
            continue
        for key, value in row.items():
            if isinstance(value, int | float):
                series.setdefault(stage, {}).setdefault(key, []).append((step, float(value)))
    return series, unread


def _read_json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file} cannot be read as JSON ({error}): repair or remove it.") from error


def _read_object(file: Path) -> dict[str, Any] | None:
    found = _read_json(file)
    if found is not None and not isinstance(found, dict):
        raise DataError(f"{file} must hold a JSON object, got {type(found).__name__}.")
    return found


# --- the page ---


def _title(root: Path, own: _Run | None) -> str:
    name = root.resolve().name
    command = _command(own)
    return f"{command}: {name}" if command and command != name else name


def _command(run: _Run | None) -> str:
    return str(run.summary.get("command", "")) if run and run.summary else ""


def _lead(own: _Run | None, stages: Sequence[_Run]) -> str:
    parts = []
    if stages:
        done = sum(run.summary is not None for run in stages)
        count = f"{len(stages)} stage" + "s" * (len(stages) != 1)
        parts.append(
            f"{count}, all finished" if done == len(stages) else f"{count}, {done} finished"
        )
    elif own and own.summary is None:
        parts.append("Not finished: the numbers so far")
    else:
        parts.append("Finished")
    summary = own.summary if own and own.summary else {}
    seconds = summary.get("seconds")
    if isinstance(seconds, int | float):
        parts[0] += f" in {_duration(float(seconds))}"
    if summary.get("seed") is not None:
        parts.append(f"seed {summary['seed']}")
    return ", ".join(parts) + "."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _sections(own: _Run | None, stages: Sequence[_Run]) -> Iterator[Section]:
    if own is not None:
        results = _results(own.path)
        if results is not None:
            yield results
        shift = _read_object(own.path / "shift.json")
        if shift is not None:
            yield shift_section(_shift_table(shift))
    if stages:
        yield Section(title="Stages", tables=[_stage_table(stages)])
    elif own is not None and own.summary:
        metrics = _metric_table(own.summary, "What the run ended with")
        if metrics.rows:
            yield Section(title="Summary", tables=[metrics])
    for run in [own, *stages] if own else stages:
        section = _run_section(run, alone=run is own)
        if section is not None:
            yield section
    if own is not None and (own.config or own.environment):
        yield Section(
            title="Configuration", details=configuration_details(own.config, own.environment)
        )


def _shift_table(plain: Mapping[str, Any]) -> ShiftTable:
    """Return what a run wrote into `shift.json`."""
    found = dict(plain)
    found["accuracies"] = [ShiftAccuracy(**a) for a in plain["accuracies"]]
    found["differences"] = [ShiftDifference(**d) for d in plain["differences"]]
    return ShiftTable(**found)


def _run_section(run: _Run, *, alone: bool) -> Section | None:
    """Return a stage's numbers and curves; `alone`: of the reported folder itself."""
    figures = [f for stage in run.series.values() for f in _metric_figures(stage)]
    text = "\n\n".join(_remarks(run))
    if alone:
        return Section(title="Training", text=text, figures=figures) if figures or text else None
    tables = [_metric_table(run.summary, "What the stage ended with")] if run.summary else []
    results = _results(run.path)
    return Section(
        title=run.name,
        text=text,
        tables=[*(results.tables if results else []), *(t for t in tables if t.rows)],
        figures=[*(results.figures if results else []), *figures],
        samples=results.samples if results else [],
        details=configuration_details(run.config, run.environment),
    )


def _remarks(run: _Run) -> list[str]:
    """Return sentences on what the figures do not show of `metrics.jsonl`."""
    found = [] if run.summary is not None else ["Not finished: these are the numbers so far."]
    if run.unread:
        lines = ", ".join(map(str, run.unread[:10])) + (", ..." if len(run.unread) > 10 else "")
        some = "1 line" if len(run.unread) == 1 else f"{len(run.unread)} lines"
        found.append(f"Left out: {some} of `metrics.jsonl` that cannot be read (line {lines}).")
    shown = [p for s in run.series.values() for key, p in s.items() if key not in _BOOKKEEPING]
    if any(len(points) > _MOST_POINTS for points in shown):
        found.append("Lines are means over successive steps, in bands from lowest to highest.")
    constant = [
        f"`{key}` " + f"{points[0][1]:.4g}".replace("-", "\N{MINUS SIGN}")
        for series in run.series.values()
        for key, points in series.items()
        if key not in _BOOKKEEPING and _is_constant(points)
    ]
    if constant:
        found.append(f"The same at every step: {', '.join(constant)}.")
    return found


# Columns of the table of stages: the first of these that any stage ended with.
_KEY_METRICS = (
    "accuracy",
    "ece",
    "gold",
    "win_rate",
    "reward",
    "kl/k1",
    "loss",
    "length",
    "spearman",
    "pairs",
    "steps",
)
_MOST_KEY_METRICS = 6


def _stage_table(stages: Sequence[_Run]) -> Table:
    ended = [_flat(run.summary.get("metrics", {})) if run.summary else {} for run in stages]
    names = list(dict.fromkeys(name for metrics in ended for name in metrics))
    ranked = [n for key in _KEY_METRICS for n in names if n == key or n.endswith(f"/{key}")]
    shown = list(dict.fromkeys(ranked))[:_MOST_KEY_METRICS]
    rows: list[list[Cell]] = []
    for run, metrics in zip(stages, ended, strict=True):
        summary = run.summary or {}
        rows.append(
            [
                run.name,
                _cell(summary.get("command")) if run.summary else "not finished",
                _cell(summary.get("seed")),
                _cell(summary.get("seconds")),
                *(metrics.get(name) for name in shown),
            ]
        )
    return Table(
        columns=["stage", "command", "seed", "seconds", *shown],
        rows=rows,
        caption="The stages, and what each ended with.",
    )


def _metric_table(summary: Mapping[str, Any], caption: str) -> Table:
    rows = [[name, value] for name, value in _flat(summary.get("metrics", {})).items()]
    return Table(columns=["metric", "value"], rows=rows, caption=f"{caption}.")


def _flat(metrics: object, name: str = "") -> dict[str, Cell]:
    """Return nested metrics under `outer/inner` names; lists and other things as text."""
    if isinstance(metrics, Mapping):
        inner = (_flat(v, f"{name}/{k}".lstrip("/")) for k, v in metrics.items())
        return {key: value for part in inner for key, value in part.items()}
    return {name: _cell(metrics)} if name else {}


def _cell(value: object) -> Cell:
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(value, default=str)


# --- curves of metrics.jsonl ---

Points = list[tuple[float, float]]


def _last(key: str) -> str:
    return key.rsplit("/", 1)[-1]


# Which metrics may share axes, in the order of the page; what none of these takes comes after.
_FAMILIES: Mapping[str, Callable[[str], bool]] = {
    "loss": lambda key: key.startswith("loss") or key.endswith("loss"),
    "accuracy": lambda key: "accurac" in key,
    "gold": lambda key: _last(key).startswith("gold"),
    "reward": lambda key: (
        key in ("reward", "mean_reward", "min_reward", "max_reward")
        or (key.startswith("rewards/") and "margin" not in key)
    ),
    "margin": lambda key: "margin" in key,
    "KL": lambda key: key in ("kl/k1", "kl/k2", "kl/k3", "kl"),
    "KL of the update": lambda key: key.startswith("kl/"),
    "length": lambda key: "length" in key,
    "nominal member": lambda key: key.startswith("objective/nominal_member"),
    "objective": lambda key: key in ("objective/nominal", "objective/worst_case"),
    "objective: spread": lambda key: key.startswith("objective/") and "nonfinite" not in key,
}
_UNITS = {"KL": "nats per completion", "KL of the update": "nats per token", "length": "tokens"}
_BOOKKEEPING = {"epoch", "num_tokens"}  # what the loop did, not what came of it


def _metric_figures(series: Mapping[str, Points]) -> list[FigureHtml]:
    """Draw a stage's metrics: the families in order, each split where scales differ too much."""
    left = {
        key: points
        for key, points in series.items()
        if key not in _BOOKKEEPING and _any_finite(points) and not _is_constant(points)
    }
    figures = [_gold_figure(series)]
    for family, belongs in _FAMILIES.items():
        members = {key: left.pop(key) for key in [k for k in left if belongs(k)]}
        if family == "reward" and {"mean_reward", "min_reward", "max_reward"} <= set(members):
            band = [members.pop(f"{which}_reward") for which in ("mean", "min", "max")]
            figures.append(_band_figure(*band))
        figures += [_metric_figure(part, family) for part in _by_scale(members)]
    figures += [_metric_figure({key: points}, "") for key, points in left.items()]
    return [figure for figure in figures if figure is not None]


def _metric_figure(members: Mapping[str, Points], family: str) -> FigureHtml:
    title = family[0].upper() + family[1:] if family and len(members) > 1 else next(iter(members))
    curves = [_thinned(name, points) for name, points in members.items()]
    return _small_figure(curves, title=title, y_label=_UNITS.get(family, ""))


def _band_figure(mean: Points, low: Points, high: Points) -> FigureHtml:
    """Draw the mean reward between the lowest and the highest of each step."""
    middle, bottom, top = (_thinned("", points) for points in (mean, low, high))
    curve = Curve(name="", x=middle.x, y=middle.y, low=bottom.y, high=top.y)
    return _small_figure([curve], title="mean_reward, min to max", y_label="")


def _small_figure(curves: Sequence[Curve], *, title: str, y_label: str) -> FigureHtml:
    figure = curve_figure(curves, title=title, x_label="step", y_label=y_label, size=_SMALL)
    return FigureHtml(svg=to_svg(figure))


def _by_scale(members: Mapping[str, Points], *, most: float = 20.0) -> list[dict[str, Points]]:
    """Part a family so that no line is flattened by another that is `most` times as large."""
    parts: list[tuple[float, dict[str, Points]]] = []
    for name, points in members.items():
        size = max(abs(v) for _, v in points if math.isfinite(v))
        for scale, part in parts:
            if max(size, scale) <= most * min(size, scale) or size == scale:
                part[name] = points
                break
        else:
            parts.append((size, {name: points}))
    return [part for _, part in parts]


def _thinned(name: str, points: Points, *, most: int = _MOST_POINTS) -> Curve:
    """Return a line of at most `most` means over equal stretches, in the band that they span."""
    if len(points) <= most:
        return Curve(name=name, x=[x for x, _ in points], y=[y for _, y in points])
    width = math.ceil(len(points) / most)
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    values = [[v for _, v in part if math.isfinite(v)] or [math.nan] for part in parts]
    return Curve(
        name=name,
        x=[sum(step for step, _ in part) / len(part) for part in parts],
        y=[sum(v) / len(v) for v in values],
        low=[min(v) for v in values],
        high=[max(v) for v in values],
    )


def _gold_figure(series: Mapping[str, Points]) -> FigureHtml | None:
    """Draw gold and proxy against the KL where a stage logged a gold reward beside `kl/k1`."""
    golds = [key for key in series if _last(key) in ("gold", "gold_reward")]
    kl = dict(series.get("kl/k1", ()))
    if not golds or not kl:
        return None
    gold = _against(kl, series[golds[0]], "gold")
    proxy = _against(kl, series.get("reward", []), "proxy")
    if not any(math.isfinite(y) for y in gold.y):
        return None
    figure = overoptimization_figure(
        {"": (gold, proxy if len(proxy.y) else None)},
        title="Gold and proxy reward",
        x_label="KL (nats, k1)",
        size=_SMALL,
    )
    return FigureHtml(svg=to_svg(figure))


def _against(kl: Mapping[float, float], points: Points, name: str) -> Curve:
    at = [(kl[step], value) for step, value in points if math.isfinite(kl.get(step, math.nan))]
    # Means over a few steps: neither the KL nor the reward of a single step is smooth.
    curve = _thinned(name, at, most=60)
    return Curve(name=name, x=curve.x, y=curve.y)


def _is_constant(points: Points) -> bool:
    return len(points) > 1 and all(value == points[0][1] for _, value in points)


def _any_finite(points: Points) -> bool:
    return any(math.isfinite(value) for _, value in points)


# --- table.json, curves.json, samples.json ---


def _results(folder: Path) -> Section | None:
    tables = _read_as(folder / "table.json", _tables_from)
    figures = _read_as(folder / "curves.json", _figures_from)
    samples = _read_as(folder / "samples.json", _samples_from)
    if not (tables or figures or samples):
        return None
    return Section(title="Results", tables=tables, figures=figures, samples=samples)


def _read_as(file: Path, make: Callable[[Any], list[Any]]) -> list[Any]:
    found = _read_json(file)
    if found is None:
        return []
    try:
        return make(found)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        what = f"misses {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{file} cannot be shown ({what}): see the help of `report_run` for its form."
        ) from error


def _tables_from(found: Any) -> list[Table]:
    return [
        Table(
            columns=[str(name) for name in table["columns"]],
            rows=[[_cell(cell) for cell in row] for row in table["rows"]],
            caption=str(table.get("caption") or ""),
            notes=str(table.get("notes") or ""),
        )
        for table in (found if isinstance(found, list) else [found])
    ]


def _figures_from(found: Any) -> list[FigureHtml]:
    figures = []
    for title, given in found.items():
        settings: dict[str, Any] = {"curves": given} if isinstance(given, list) else given
        over_kl = "KL" in title or "optimi" in title.lower()
        x_scale: Scale = settings.get("x_scale", "sqrt" if over_kl else "linear")
        figure = curve_figure(
            [_curve_from(curve) for curve in settings["curves"]],
            title=title,
            x_label=str(settings.get("x_label", KL_LABEL if over_kl else "step")),
            y_label=str(settings.get("y_label", "reward" if over_kl else "")),
            x_scale=x_scale,
        )
        figures.append(FigureHtml(svg=to_svg(figure), caption=str(settings.get("caption") or "")))
    return figures


def _curve_from(found: Mapping[str, Any]) -> Curve:
    known = {f.name for f in fields(Curve)}
    unknown = [key for key in found if key not in known]
    if unknown:
        raise ValueError(f"a curve has no {unknown[0]!r}, only {', '.join(sorted(known))}")
    numbers = {
        key: [math.nan if v is None else float(v) for v in found[key]]
        for key in ("x", "y", "low", "high")
        if found.get(key) is not None
    }
    return Curve(
        name=str(found["name"]),
        dashed=bool(found.get("dashed", False)),
        color=found.get("color"),
        **numbers,
    )


def _samples_from(found: Any) -> list[SampleRow]:
    return [
        SampleRow(
            prompt=str(row["prompt"]),
            completions=[
                Completion(
                    text=str(c["text"]),
                    label=str(c.get("label") or ""),
                    scores={str(k): v for k, v in (c.get("scores") or {}).items()},
                )
                for c in row["completions"]
            ],
        )
        for row in found
    ]


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    lines = [[" ".join(column.split()) for column in table.columns]]
    lines += [["---"] * len(table.columns)]
    lines += [["" if cell is None else str(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
