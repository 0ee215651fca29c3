"""What commands share: how sources are read, rewards are found, and runs begin and end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from trueward.console import main_console
from trueward.data.formats import DataError, Loaded
from trueward.data.functions import is_python_function, python_function
from trueward.models.reward_function import Reward, load_reward_models
from trueward.train.run_folder import RunFolder, finished_summary

console = main_console()


@runtime_checkable
class HasOutput(Protocol):
    """A command's configuration that names the folder of its run."""

    @property
    def output_dir(self) -> str:
        """Where the run is written."""
        ...


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How sources are looked up and read."""

    data_dir: str = ""  # folder that holds the data instead of the hub; also TRUEWARD_DATA
    local_names: dict[str, str] = field(default_factory=dict)  # hub name -> name under data_dir
    conversational: bool = False  # make strings into user turns
    max_rows: int = 0  # 0 = all

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the load functions."""
        return {
            "data_dir": self.data_dir or None,
            "local_names": self.local_names,
            "conversational": self.conversational,
            "max_rows": self.max_rows or None,
        }


def load_reward(names: Sequence[str]) -> Reward:
    """Return a reward model, several, or the function that `FILE.py:FUNCTION` names."""
    if not names:
        raise DataError("A reward is needed: a reward model's folder, or FILE.py:FUNCTION.")
    if is_python_function(names[0]):
        if len(names) > 1:
            raise DataError("Give either one reward function or reward models, not both.")
        return python_function(names[0], what="reward function")
    models = load_reward_models(*names)
    return models[0] if len(models) == 1 else models


def completions_of_rows(
    rows: list[dict[str, Any]], source: str
) -> tuple[list[Any], list[Any], list[int]]:
    """Return prompts and completions, flat, and how many each row holds."""
    prompts, completions, counts = [], [], []
    for line, row in enumerate(rows, start=1):
        some = row.get("completions", [row["completion"]] if "completion" in row else None)
        if some is None or "prompt" not in row:
            raise DataError(
                f"{source}, row {line}: needs 'prompt' and 'completion' (or 'completions'), has "
                f"{', '.join(row) or 'nothing'}."
            )
        prompts += [row["prompt"]] * len(some)
        completions += some
        counts.append(len(some))
    return prompts, completions, counts


def finished(config: HasOutput, name: str) -> bool:
    """Tell whether the folder holds this very run, finished; refuse another one's."""
    if finished_summary(config.output_dir) is None:
        return False
    start(config, name)
    console.print(f"{config.output_dir} is finished; remove it to start afresh.", highlight=False)
    return True


def start(config: HasOutput, name: str) -> None:
    """Save the command's whole configuration once its inputs are read; refuse another run's."""
    RunFolder(config.output_dir, command=name, config=config)


def tell(output_dir: str, loaded: Loaded[Any]) -> None:
    """Print what was read, what was left out, and the summary's numbers."""
    console.print(loaded.report.summary(), highlight=False)
    summary = finished_summary(output_dir)
    if summary is not None:
        console.print(
            f"{output_dir}: {summary['seconds']:.0f} s; {numbers_text(summary['metrics'])}",
            highlight=False,
        )


def numbers_text(metrics: dict[str, Any]) -> str:
    """Return names and numbers on one line."""
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()
    )
