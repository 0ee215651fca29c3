"""The alarm: tells from signals without gold that a policy has passed the point where gold falls.

Each signal (`train.signals`, and the length, KL, log-probability and energy loss of a step) is
counted from its values over the run's first steps, in a unit (`Unit`); a weighted sum is the score.
The alarm is raised where the score, or its cumulative sum above a slack (CUSUM, Page 1954,
https://doi.org/10.1093/biomet/41.1-2.100), has exceeded a threshold in several steps running.
Weights, threshold and the rest come from runs with a known gold (`evaluate.alarm.calibrate`).
"""

import itertools
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trueward.data.sources import DataError
from trueward.train.run_folder import write_text
from trueward.train.signals import Monitor, Seen, signals_of

logger = logging.getLogger(__name__)

MOST_SNAPSHOTS = 20
PREFIX = "alarm/"  # of the signals and the score in a run's metrics
SCORE = "score"
# What a signal is called in metrics and calibrations; see `train.signals` for the first eight.
SIGNALS = (
    "gain",
    "spread",
    "gap",
    "spread_share",
    "disagreement",
    "width",
    "drift",
    "outlyingness",
    "length",  # tokens of a completion
    "kl",  # k1 to the reference, nats a completion
    "logprob",  # of a token, under the policy itself
    "energy_loss",  # of the policy's last layer, see `models.policy.energy_losses`
)


# What a signal is counted in. window: the standard deviation of its first values, at least its
# floor; a trend is in it, so that the score of a steady signal is a clock. differences: the
# same from the differences of neighbours (von Neumann), where a trend weighs little. floor: its
# floor alone. raw: its own unit, from 0 on; an alarm that reads the KL alone is then a KL budget.
Unit = Literal["window", "differences", "floor", "raw"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How signals become an alarm."""

    weights: dict[str, float]  # of the standardised signals in the score
    threshold: float  # of the score, or of its cumulative sum
    unit: Unit = "window"
    # The least that a signal's values of the first steps are taken to vary, in its own units: few
    # values tell little of how they vary.
    floors: dict[str, float] = field(default_factory=dict)
    window: int = 5  # first steps, from which the signals are counted; no alarm within them
    patience: int = 1  # steps in a row
    slack: float | None = None  # taken from the score before it is summed; None: nothing is summed
    rewind: float = 1.0  # go back to the policy after this share of the updates before the alarm
    note: str = ""  # where it comes from

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.weights, *self.floors) if name not in SIGNALS]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is no signal; there are {', '.join(SIGNALS)}.")
        if not any(self.weights.values()):
            raise ValueError("weights must give at least one signal a weight other than 0.")
        if any(not value > 0 for value in self.floors.values()):
            raise ValueError(f"floors must be above 0, got {self.floors}.")
        if self.unit not in get_args(Unit):  # from JSON it may be anything
            raise ValueError(f"unit is one of {', '.join(get_args(Unit))}, got '{self.unit}'.")
        if self.unit == "floor" and not set(self.weights) <= set(self.floors):
            raise ValueError(f"the unit 'floor' needs a floor for each signal, got {self.floors}.")
        if self.window < (0 if self.unit == "raw" else 2):
            raise ValueError(f"window must be at least 2 steps, got {self.window}.")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 step, got {self.patience}.")
        if not 0 <= self.rewind <= 1:
            raise ValueError(f"rewind is a share in [0, 1], got {self.rewind}.")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, got {self.threshold}.")

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            DataError: The file is missing, or holds something else.
        """
        try:
            return cls(**json.loads(Path(path).read_text("utf-8")))
        except OSError as error:
            raise DataError(f"The calibration {path} cannot be read: {error.strerror}.") from error
        except (TypeError, ValueError) as error:
            raise DataError(f"{path} holds no alarm's calibration: {error}") from error


# What an alarm uses that is given no calibration: the rules that `trueward alarm` chose in the
# embedded world (docs/alarm.md). Their floors and thresholds are those of its models and batches.
_CHOSEN = "chosen on 22 runs of small policies in the embedded world, docs/alarm.md"
WARN = Calibration(
    weights={"outlyingness": 1.0, "logprob": -1.0},
    floors={"outlyingness": 0.016593, "logprob": 0.018556},
    unit="differences",
    threshold=9.067,
    patience=2,
    note=_CHOSEN,
)
# Its sum grows with every step: of runs of 40 steps at 2.5e-4.
STOP = Calibration(
    weights={"disagreement": 1.0, "kl": 1.0},
    floors={"disagreement": 0.020157, "kl": 0.12973},
    unit="floor",
    threshold=1107.0,
    slack=1.0,
    rewind=0.5,
    note=_CHOSEN,
)


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """Whether and how a policy's optimisation is watched."""

    # log: the signals are logged, nothing else; no calibration is read. warn: one line when the
    # alarm is raised. stop: the run ends there, with the policy that `Calibration.rewind` goes to.
    action: Literal["off", "log", "warn", "stop"] = "off"
    calibration: str = ""  # JSON that `trueward alarm` wrote; empty: `WARN` or `STOP`
    reference_prompts: int = 128  # answered by the reference policy: what its states look like
    # Steps between the snapshots that a stopped run goes back to; more where they would be more
    # than `MOST_SNAPSHOTS`.
    keep_every: int = 1

    def __post_init__(self) -> None:
        for name, least in (("reference_prompts", 2), ("keep_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    def load(self) -> Calibration:
        """Return the calibration that it names, or the one that ships for what it does."""
        if self.calibration:
            return Calibration.load(self.calibration)
        return STOP if self.action == "stop" else WARN


# ---- the statistic -----------------------------------------------------------------------------


def unit_of(first: Sequence[float], *, unit: Unit, floor: float = 0.0) -> float:
    """Return what a signal is counted in, from its values in the run's first steps.

    Args:
        first: Two at least, but in the unit `raw`.
        unit: Which; the standard deviation has ddof 1, the mean squared difference of neighbours
            is halved (von Neumann 1941, https://doi.org/10.1214/aoms/1177731677).
        floor: The least; with 0, one of 1e-6 of the mean's size is assumed.
    """
    if unit == "raw":
        return 1.0
    mean = sum(first) / len(first)
    variance = 0.0
    if unit == "window":
        variance = sum((v - mean) ** 2 for v in first) / (len(first) - 1)
    elif unit == "differences":
        squares = [(b - a) ** 2 for a, b in itertools.pairwise(first)]
        variance = sum(squares) / len(squares) / 2
    return max(math.sqrt(variance), floor, 1e-6 * abs(mean), 1e-12)


def standardised(
    value: float, first: Sequence[float], *, unit: Unit = "window", floor: float = 0.0
) -> float:
    """Count a value from the mean of the first ones, in a unit; from 0 in the unit `raw`."""
    start = 0.0 if unit == "raw" else sum(first) / len(first)
    return (value - start) / unit_of(first, unit=unit, floor=floor)


class Alarm:
    """The state of an alarm over a run: a score at each step, and when it was raised.

    Args:
        calibration: How signals become an alarm.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.first: dict[str, list[float]] = {name: [] for name in calibration.weights}
        self.summed = 0.0
        self.above = 0  # steps in a row
        self.raised_at: int | None = None

    def update(self, step: int, signals: Mapping[str, float]) -> float | None:
        """Take in a step's signals; return what is held against the threshold.

        None within the window. Once raised, the alarm stays raised. A step with a signal that is
        not finite is left out, as if it had not been: None.

        Raises:
            ValueError: A signal with a weight is missing.
        """
        rules = self.calibration
        for name in rules.weights:
            if name not in signals:
                raise ValueError(
                    f"The alarm's calibration reads the signal '{name}', which step {step} has not "
                    f"({', '.join(sorted(signals)) or 'it has none'}): give a monitor that has it, "
                    "or another calibration."
                )
        if not all(math.isfinite(signals[name]) for name in rules.weights):
            return None
        if any(len(values) < rules.window for values in self.first.values()):
            for name, values in self.first.items():
                values.append(float(signals[name]))
            return None
        score = 0.0
        for name, weight in rules.weights.items():
            floor = rules.floors.get(name, 0.0)
            score += weight * standardised(
                signals[name], self.first[name], unit=rules.unit, floor=floor
            )
        if rules.slack is not None:
            self.summed = score = max(0.0, self.summed + score - rules.slack)
        self.above = self.above + 1 if score > rules.threshold else 0
        if self.above >= rules.patience and self.raised_at is None:
            self.raised_at = step
        return score

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as JSON."""
        return {
            "first": {name: list(values) for name, values in self.first.items()},
            "summed": self.summed,
            "above": self.above,
            "raised_at": self.raised_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.first = {name: list(values) for name, values in state["first"].items()}
        self.summed, self.above = state["summed"], state["above"]
        self.raised_at = state["raised_at"]


# ---- going back --------------------------------------------------------------------------------


def kept_places(place: int, *, rewind: float, every: int = 1) -> range:
    """Return the places whose weights are kept at a place: `MOST_SNAPSHOTS` at most.

    All that an alarm may go back to from here on, evenly apart: every `every`-th, or where these
    are too many every second of them, and so on. It begins low enough that the doubled distance
    finds its own first place there. With a rewind of 0 only the start is kept.
    """
    if rewind == 0:
        return range(1)
    needed, apart = math.floor(rewind * place), every
    while place - needed > (MOST_SNAPSHOTS - 3) * apart:
        apart *= 2
    return range(needed // (2 * apart) * 2 * apart, place + 1, apart)


class Snapshots:
    """Trained weights at some places of a run, in a folder, or in memory where there is none.

    A place is a number of updates: 0 is the policy that the run started from.

    Args:
        module: Whose trained parameters are kept.
        folder: None for memory, which a killed run loses; it has no checkpoint either.
        every: See `kept_places`.
        writes: Whether this process writes, of several.
    """

    def __init__(
        self, module: nn.Module, folder: Path | None, *, every: int = 1, writes: bool = True
    ) -> None:
        self._module, self._folder = module, folder
        self._every, self._writes = every, writes
        self._kept: dict[int, dict[str, Tensor]] = {}

    def keep(self, place: int, *, rewind: float) -> None:
        """Keep the weights as they are now, if their place is one to keep; drop what is not."""
        wanted = kept_places(place, rewind=rewind, every=self._every)
        if place in wanted:
            tensors = {n: p.detach().cpu().clone() for n, p in self._trained()}
            if self._folder is None:
                self._kept[place] = tensors
            elif self._writes:
                self._folder.mkdir(parents=True, exist_ok=True)
                draft = self._folder / "draft.tmp"
                save_file({k: v.contiguous() for k, v in tensors.items()}, draft)
                draft.replace(self._file(place))
        for old in self._places():
            if old not in wanted:
                self._kept.pop(old, None)
                if self._folder is not None and self._writes:
                    self._file(old).unlink()

    def restore(self, place: int) -> int:
        """Put back the last weights that were kept at or before a place; return theirs.

        Where there are none, as in a folder that files were taken from, the earliest that are.

        Raises:
            DataError: Nothing is kept.
        """
        places = self._places()
        if not places:
            raise DataError(f"No snapshot of the policy is left in {self._folder or 'memory'}.")
        found = max((p for p in places if p <= place), default=places[0])
        if found > place:
            logger.warning(
                "No snapshot is left of step %d or before: the earliest is put back.", place
            )
        tensors = self._kept.get(found) or load_file(self._file(found))
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(tensors[name])
        return found

    def clear(self) -> None:
        """Drop all of them."""
        self._kept.clear()
        if self._folder is not None and self._writes:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._module.named_parameters() if p.requires_grad]

    def _places(self) -> list[int]:
        if self._folder is None:
            return sorted(self._kept)
        return sorted(int(file.stem) for file in self._folder.glob("*.safetensors"))

    def _file(self, place: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{place:06d}.safetensors"


# ---- in the loop -------------------------------------------------------------------------------


class Guard:
    """An alarm in a policy's optimisation: asked once in each step, before it learns.

    A step's completions are those of the policy after all steps before it: an alarm raised in step
    t is about the policy of place t - 1.

    Args:
        config: Options.
        monitor: Who watches.
        reference: What the monitor sees of the reference policy's completions.
        snapshots: Where a stopped run finds the policy that it goes back to.
    """

    def __init__(
        self, config: AlarmConfig, monitor: Monitor, reference: Seen, snapshots: Snapshots
    ) -> None:
        self.config, self.monitor, self.reference = config, monitor, reference
        self.snapshots = snapshots
        # What is only logged must not need the signals of any calibration.
        self.alarm = None if config.action == "log" else Alarm(config.load())
        self._told_of: set[str] = set()  # signals that were not finite
        if self.alarm is not None and not config.calibration:
            logger.warning(
                "The alarm has no calibration of its own and takes one of small policies in a "
                "made-up world, in units of their models and batches; the one that stops sums over "
                "steps too, so that rate and number of steps matter: calibrate it on runs of your "
                "own (`trueward alarm`)."
            )

    @property
    def raised_at(self) -> int | None:
        """The step in which the alarm was raised."""
        return None if self.alarm is None else self.alarm.raised_at

    @property
    def stops(self) -> bool:
        """Whether the run is to end now."""
        return self.raised_at is not None and self.config.action == "stop"

    def look(
        self, step: int, seen: Seen, others: Mapping[str, float], *, samples: int
    ) -> dict[str, float]:
        """Take in a step's completions; return what to log.

        Args:
            step: 1-based.
            seen: What the monitor sees of the step's completions, those of a prompt in a row.
            others: Signals that no monitor is needed for.
            samples: Completions of each prompt.
        """
        signals = signals_of(seen, self.reference, samples=samples) | dict(others)
        odd = {name for name, value in signals.items() if not math.isfinite(value)} - self._told_of
        if odd:
            self._told_of |= odd
            logger.warning(
                "Not finite in step %d: the alarm's signal(s) %s. An alarm that reads them leaves "
                "such steps out.",
                *(step, ", ".join(sorted(odd))),
            )
        metrics = {f"{PREFIX}{name}": value for name, value in signals.items()}
        if self.alarm is None:
            return metrics
        if self.config.action == "stop":
            self.snapshots.keep(step - 1, rewind=self.alarm.calibration.rewind)
        score = self.alarm.update(step, signals)
        if score is not None:
            metrics[PREFIX + SCORE] = score
            if self.raised_at == step:
                self._tell(step, score)
        if self.raised_at is not None:
            metrics[f"{PREFIX}raised_at"] = float(self.raised_at)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as JSON."""
        found: dict[str, Any] = {"action": self.config.action}
        if self.alarm is not None:
            found |= {"calibration": asdict(self.alarm.calibration)} | self.alarm.state_dict()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            DataError: It is another alarm's.
        """
        if self.alarm is None:
            return
        for name in ("action", "calibration"):
            if state.get(name) != self.state_dict().get(name):
                raise DataError(
                    f"The run was started with another {name} of its alarm: resume it with the "
                    "same, or give another output_dir."
                )
        self.alarm.load_state_dict(state)

    def go_back(self) -> int:
        """Put back the policy that the run ends with; return its place."""
        assert self.alarm is not None
        assert self.alarm.raised_at is not None
        wanted = math.floor(self.alarm.calibration.rewind * (self.alarm.raised_at - 1))
        place = self.snapshots.restore(wanted)
        logger.warning("The policy is the one after %d steps.", place)
        return place

    def _tell(self, step: int, score: float) -> None:
        assert self.alarm is not None
        rules = self.alarm.calibration
        logger.warning(
            "Alarm in step %d: the score of %s stands at %.4g, above %.4g in %d step(s) running: "
            "the policy has likely passed the point where its true worth falls.",
            step,
            " and ".join("-" * (w < 0) + name for name, w in rules.weights.items() if w),
            score,
            rules.threshold,
            rules.patience,
        )
