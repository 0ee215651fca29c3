"""Start-up: `trueward --help`, and what importing trueward adds to importing torch.

python benchmarks/startup.py
"""

import subprocess
import sys
from pathlib import Path

from harness import Row, alternate, parser, show, timed, write


def main() -> None:
    args = parser(__doc__).parse_args()
    python = sys.executable
    commands = {
        "help": [str(Path(python).parent / "trueward"), "--help"],
        "torch": [python, "-c", "import torch"],
        "trueward": [python, "-c", "import torch, trueward"],
        "names": [python, "-c", "import torch; from trueward import RewardPosterior, objectives"],
    }
    runs = {
        name: lambda _, c=command: timed(lambda: subprocess.run(c, check=True, capture_output=True))
        for name, command in commands.items()
    }
    seconds = alternate(runs, args.repeats)
    one = [1.0] * args.repeats
    beyond = {
        name: [a - b for a, b in zip(seconds[name], seconds["torch"], strict=True)]
        for name in ("trueward", "names")
    }
    rows = [
        Row(
            work=work,
            setting="seconds",
            against="one second",
            seconds=values,
            other_seconds=one,
            bar=bar,
            at_most=True,
        )
        for work, values, bar in [
            ("trueward --help", seconds["help"], 0.3),
            ("import trueward, beyond torch", beyond["trueward"], 0.5),
            ("and its posterior and objectives, beyond torch", beyond["names"], 0.5),
        ]
    ]
    for row in rows:
        show(row)
    write(rows, args.output)


if __name__ == "__main__":
    main()
