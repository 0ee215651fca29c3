"""What each command does: makes objects from names and files, and calls the functions below."""

from collections.abc import Callable, Sequence

from trueward.commands.averaging import AverageCommand, average
from trueward.commands.evaluation import EvaluateCommand, ReportCommand, evaluate, report
from trueward.commands.preferences import AuditCommand, audit
from trueward.commands.sampling import SampleCommand, ScoreCommand, sample, score
from trueward.commands.training import (
    PolicyCommand,
    RefineCommand,
    RewardCommand,
    SFTCommand,
    policy,
    refine,
    reward,
    rlp,
    sft,
)
from trueward.config import parse
from trueward.lab.alarm import AlarmStudyConfig, run_alarm
from trueward.lab.compare import run_compare
from trueward.lab.demo import DemoConfig, run_demo
from trueward.lab.families import FamiliesConfig, run_families
from trueward.lab.plan import CompareConfig
from trueward.lab.refinements import RefinementsConfig, run_refinements
from trueward.pipeline import RLPConfig

RUNS: dict[str, tuple[type, Callable[..., object]]] = {
    "demo": (DemoConfig, run_demo),
    "sft": (SFTCommand, sft),
    "reward": (RewardCommand, reward),
    "policy": (PolicyCommand, policy),
    "sample": (SampleCommand, sample),
    "score": (ScoreCommand, score),
    "refine": (RefineCommand, refine),
    "rlp": (RLPConfig, rlp),
    "audit": (AuditCommand, audit),
    "evaluate": (EvaluateCommand, evaluate),
    "average": (AverageCommand, average),
    "compare": (CompareConfig, run_compare),
    "alarm": (AlarmStudyConfig, run_alarm),
    "families": (FamiliesConfig, run_families),
    "refinements": (RefinementsConfig, run_refinements),
    "report": (ReportCommand, report),
}


def run(name: str, arguments: Sequence[str]) -> None:
    """Parse a command's configuration and run it."""
    config_class, function = RUNS[name]
    function(parse(config_class, arguments, command=name))
