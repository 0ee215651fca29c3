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
from trueward.data.formats import DataError
from trueward.lab.alarm import AlarmStudyConfig, run_alarm
from trueward.lab.compare import run_compare
from trueward.lab.demo import DemoConfig, run_demo
from trueward.lab.evidence import EvidenceConfig, run_evidence
from trueward.lab.families import FamiliesConfig, run_families
from trueward.lab.plan import CompareConfig
from trueward.lab.refinements import RefinementsConfig, run_refinements
from trueward.pipeline import RLPConfig
from trueward.train.processes import process_count

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
    "evidence": (EvidenceConfig, run_evidence),
    "alarm": (AlarmStudyConfig, run_alarm),
    "families": (FamiliesConfig, run_families),
    "refinements": (RefinementsConfig, run_refinements),
    "report": (ReportCommand, report),
}

OVER_PROCESSES = ("sft", "reward", "policy")  # what torchrun may start several times


def run(name: str, arguments: Sequence[str]) -> None:
    """Parse a command's configuration and run it.

    Raises:
        DataError: Several processes run a command that does not share its work among them.
    """
    config_class, function = RUNS[name]
    config: object = parse(config_class, arguments, command=name)
    if process_count() > 1 and name not in OVER_PROCESSES:
        raise DataError(
            f"{name} runs in one process, and torchrun started {process_count()}: leave torchrun "
            f"to {', '.join(OVER_PROCESSES)}."
        )
    function(config)
