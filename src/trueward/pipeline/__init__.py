"""RLP: the stages of a run, each in its folder, resumable.

Lang et al. 2024, Algorithm 1 (https://arxiv.org/abs/2403.19279)::

    sft -> reward -> policy -> samples -> refine (SPG | UML) -> policy again, from SFT
                        ^                                              |
                        '---------------- next round ------------------'

With `policy.refresh_every` the reward is also trained again within a policy's run, on what the
policy writes by then. A stage is done when its folder holds a `summary.json`; it is then loaded,
never done again. A killed stage goes on from its last checkpoint. The folder's own `summary.json`
holds the numbers of every stage, `table.json` the comparison of the policies.
"""

from trueward.pipeline.config import RLPConfig, RLPData, StopConfig
from trueward.pipeline.evaluation import evaluate_on
from trueward.pipeline.run import run_rlp

__all__ = ["RLPConfig", "RLPData", "StopConfig", "evaluate_on", "run_rlp"]
