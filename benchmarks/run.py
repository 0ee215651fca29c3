"""All benchmarks in one command, and the page that tells what they found.

    make bench DATA=DIR        or        python benchmarks/run.py --data_dir DIR

Parts that have been measured are not measured again: remove their file in `runs/benchmarks`, or
name them with `--again`. Then docs/performance.md and its figure are written from the files.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from harness import Row, copy_rate, matrix_rate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
# Each part's script, and what it needs: data, TRL.
PARTS = {
    "reward_training": ("data", "trl"),
    "scoring": (),
    "ensembles": (),
    "policy_step": ("trl",),
    "generation": (),
    "clustering": (),
    "startup": (),
    "growth": (),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data_dir", type=Path, help="holds hh_helpful and alpaca_eval_gpt4")
    options.add_argument("--output_dir", type=Path, default=HERE.parent / "runs" / "benchmarks")
    options.add_argument("--again", nargs="*", default=[], choices=list(PARTS))
    options.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=7)
    args = options.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        file = args.output_dir / f"{part}.json"
        if file.exists() and part not in args.again:
            continue
        command = [sys.executable, str(HERE / f"{part}.py"), "--output", f"{file}.part"]
        command += ["--threads", str(args.threads), "--repeats", str(args.repeats)]
        if "data" in PARTS[part]:
            if args.data_dir is None:
                print(f"{part} is left out: it needs --data_dir.")
                continue
            command += ["--data_dir", str(args.data_dir)]
        print(f"\n{part}", flush=True)
        start = time.time()
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
        found = {"seconds": time.time() - start, "machine": machine(args.threads)}
        found["rows"] = json.loads(Path(f"{file}.part").read_text())
        file.write_text(json.dumps(found, indent=1) + "\n")
        Path(f"{file}.part").unlink()
    write_page(args.output_dir)


def machine(threads: int) -> dict[str, Any]:
    """Say on what the numbers were measured."""
    torch.set_num_threads(threads)
    asked = ["git", "rev-parse", "--short", "HEAD"]
    answer = subprocess.run(asked, capture_output=True, text=True, cwd=HERE, check=False)
    return {
        "threads": threads,
        "processor": platform.processor() or platform.machine(),
        "gigaflops": round(matrix_rate() / 1e9),
        "gigabytes": round(copy_rate() / 1e9, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl_version(),
        "commit": answer.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def trl_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return "not installed"


def write_page(folder: Path) -> None:
    """Write docs/performance.md and its figure from what was measured."""
    found = {p: json.loads(f.read_text()) for p in PARTS if (f := folder / f"{p}.json").exists()}
    if not found:
        raise SystemExit(f"Nothing was measured yet in {folder}.")
    rows = [Row(**row) for p, part in found.items() if p != "growth" for row in part["rows"]]
    where = next(iter(found.values()))["machine"]
    rates = [part["machine"]["gigaflops"] for part in found.values()]
    hours = sum(part["seconds"] for part in found.values()) / 3600
    held = [row for row in rows if row.bar is not None]
    turns = " or ".join(map(str, sorted({len(row.seconds) for row in rows})))
    missed = [row for row in held if not reached(row)]
    absent = [part for part in PARTS if part not in found]
    # A part that was broken off says in its file what it lacks.
    absent += [f"{p} ({part['left_out']})" for p, part in found.items() if part.get("left_out")]
    lines = [
        "# Performance",
        "",
        "Made by `make bench DATA=DIR` (`benchmarks/run.py`), which measures and writes this page.",
        f"{where['threads']} threads of {where['processor']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, TRL {where['trl']}; matrix products ran at {min(rates)} to "
        f"{max(rates)} GFLOP/s, copies at {where['gigabytes']} GB/s (read and written); commits "
        f"{', '.join(dict.fromkeys(part['machine']['commit'] for part in found.values()))}, "
        f"{where['date']}; {hours:.1f} hours.",
        "",
        "Everything compared runs in turns in one process, on the same weights, threads and",
        f"precision (float32): {turns} turns after one that warms up. A ratio is their median and",
        "its range: how many times as fast ours is, or, where it says `cost`, how many times as",
        "long ours takes as the thing beside it. Memory is the peak of a process of its own, ours",
        "over the other's, Python and libraries counted in on both sides. The limit is the time",
        "that the machine's matrix products, measured in the same turns, take for operations that",
        "cannot be saved (attention, optimiser and vocabulary are left out of them).",
        "",
        "![Ratios with their ranges, and the bars they are held to](figures/performance.png)",
        "",
        *([f"Not measured yet: {', '.join(absent)}.", ""] if absent else []),
        f"{len(held) - len(missed)} of {len(held)} bars are reached."
        + (" Not reached: " if missed else ""),
        *(f"- {row.work}, {row.setting}: {row.ratio:.2f} of {row.bar}" for row in missed),
        "",
        *table(rows),
        "",
        "`check` says how far both sides' results agree.",
        "",
    ]
    if "growth" in found:
        lines += growth_lines(found["growth"]["rows"])
    text = HERE / "performance_notes.md"
    lines += ["", text.read_text().strip()] if text.exists() else []
    (DOCS / "performance.md").write_text("\n".join(lines) + "\n")
    figure(rows, DOCS / "figures" / "performance.png")
    print(f"{DOCS / 'performance.md'}")


def reached(row: Row) -> bool:
    """Whether the median keeps the bar, and memory its own."""
    assert row.bar is not None
    fast = row.ratio <= row.bar if row.at_most else row.ratio >= row.bar
    if row.memory_bar is None:
        return fast
    assert row.memory is not None
    assert row.other_memory is not None
    return fast and row.memory / row.other_memory <= row.memory_bar


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| work | setting | beside | ratio | bar | memory | of the limit | check |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = min(row.ratios), max(row.ratios)
        ratio = f"{'cost ' if row.at_most else ''}{row.ratio:.2f} ({low:.2f} to {high:.2f})"
        bar = "" if row.bar is None else f"{'≤' if row.at_most else '≥'} {row.bar}"
        memory = "" if not row.memory else f"{row.memory / (row.other_memory or 1):.2f}"
        if row.memory_bar is not None:
            memory += f" (≤ {row.memory_bar})"
        limit = "" if row.limit_reached is None else f"{row.limit_reached:.0%}"
        cells = [row.work, row.setting, row.against, ratio, bar, memory, limit, row.check]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def growth_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "## How cost grows",
        "",
        "Slopes on log scales (1 is proportional), beside those of the operations alone; seconds",
        "at the least and the most, and how much of the limit is reached there.",
        "",
        "| cost of | slope | of operations | from | to |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in found.values():
        ends = [
            f"{case['x'][i]:,}: {case['seconds'][i]:.3f} s, "
            f"{case['floor'][i] / case['seconds'][i]:.0%}"
            for i in (0, -1)
        ]
        slopes = f"{case['slope']:.2f} | {case['floor_slope']:.2f}"
        lines.append(f"| {case['what']} | {slopes} | {ends[0]} | {ends[1]} |")
    return lines


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw every ratio that has a bar, with its range and the bar."""
    held = [row for row in rows if row.bar is not None and row.against != "one second"]
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    drawn, axes = plt.subplots(figsize=(7.2, 0.26 * len(held) + 0.8))
    for y, row in enumerate(reversed(held)):
        # A cost is drawn by how far it keeps below its bar, so that right is always better.
        ratios = (
            [row.bar / r for r in row.ratios] if row.at_most else [r / row.bar for r in row.ratios]
        )
        colour = "#1b7f5c" if reached(row) else "#c44536"
        axes.plot([min(ratios), max(ratios)], [y, y], color=colour, lw=2, solid_capstyle="round")
        axes.plot(statistics.median(ratios), y, "o", color=colour, ms=4)
    axes.axvline(1, color="#444444", lw=0.8)
    axes.set_yticks(
        range(len(held)), [f"{r.work}, {r.setting.split(',')[0]}" for r in reversed(held)]
    )
    axes.set_xscale("log")
    axes.set_xlabel("ratio over its bar (right of the line: reached)")
    axes.set_xticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
    axes.minorticks_off()
    drawn.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


if __name__ == "__main__":
    main()
