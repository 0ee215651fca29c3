"""Who prints, and how wide: what commands, studies and their workers share.

Nothing heavy is imported here, since every worker of a comparison starts afresh.
"""

import os

from rich.console import Console


def is_main_process() -> bool:
    """Tell whether this is the process that writes and prints: the first one of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def main_console() -> Console:
    """Return a console on standard error that only the first process prints to.

    Where that is no terminal, nothing reads it but files and people who search them: a line is
    then not broken at 80 characters, which would cut paths in two.
    """
    console = Console(stderr=True, quiet=not is_main_process())
    if not console.is_terminal:
        console.width = _WIDE
    return console


_WIDE = 1_000
