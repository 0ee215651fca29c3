"""The commands; nothing but parsing, and calling `trueward.commands`."""

import difflib
import logging
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "the whole story on the embedded world, in minutes, without a download",
    "sft": "train a policy on demonstrations",
    "reward": "train a reward on preferences: a single head, or any family with an uncertainty",
    "policy": "optimise a policy against a reward: ppo, rloo or grpo",
    "sample": "draw completions: prompts in, JSONL out",
    "score": "score completions: JSONL in, JSONL out",
    "refine": "a reward trained again on policy samples: spg, uml, their ablations, the control",
    "rlp": "the whole pipeline, resumable, for as many rounds as asked",
    "audit": "preferences under suspicion: verdicts, gates, balanced lengths, people's answers",
    "evaluate": "rewards on preferences or on what policies write; completions by win rate",
    "average": "one reward model whose weights are the mean of several's (WARM), once tested",
    "compare": "methods x seeds in a world with a known gold reward: curves, tables, a page",
    "evidence": "claims of papers held against stored comparisons: a page with verdicts",
    "alarm": "an alarm without gold: calibrated on some watched runs of compare, judged on others",
    "refinements": "rewards refined on recorded samples of a policy, cross-validated by prompt",
    "families": "every family of rewards on real preferences: accuracy, uncertainty, cost",
    "report": "the HTML report of a run",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's error is one sentence and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0
    if arguments[0] == "--version":
        from trueward import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        print(f"trueward: unknown command '{name}'; did you mean '{near}'?", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("trueward").setLevel(logging.INFO)
    return _run(name, rest)


def usage() -> str:
    """Return what `trueward --help` prints."""
    lines = [f"  {name:<11} {does}" for name, does in COMMANDS.items()]
    return (
        "usage: trueward COMMAND [--config FILE.yaml] [--any.field value ...]\n\n"
        "Reward learning that survives optimisation.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`trueward COMMAND --help` lists a command's fields."
    )


def _run(name: str, arguments: list[str]) -> int:
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    from trueward import commands

    transformers_logging.set_verbosity_error()  # its load reports and bars are not our progress
    transformers_logging.disable_progress_bar()
    if os.environ.get("RANK", "0") != "0":  # the first process speaks for all
        logging.getLogger("trueward").setLevel(logging.ERROR)
    try:
        commands.run(name, arguments)
    except KeyboardInterrupt:
        print(f"\ntrueward {name}: interrupted; run it again to go on.", file=sys.stderr)
        return 130
    except (
        ArithmeticError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        if os.environ.get("TRUEWARD_TRACEBACK"):
            raise
        print(f"trueward {name}: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: BaseException) -> str:
    """Return an error's first line, with what to do about a full disk or too little memory."""
    text = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    if "No space left" in str(error) or "File too large" in str(error):
        return f"{text.rstrip('.')}: free some space and run it again, it goes on where it was."
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist: check the path."
    if isinstance(error, ArithmeticError | LookupError | RuntimeError | TypeError) or not text:
        return f"{type(error).__name__}: {text} (TRUEWARD_TRACEBACK=1 shows where)"
    return text


if __name__ == "__main__":
    sys.exit(main())
