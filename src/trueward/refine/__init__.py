"""From the policy's samples to a better reward model: RLP's multi-view and synthetic methods."""

from trueward.refine.equivalence import (
    EmbeddingEquivalence,
    Equivalence,
    NLIEquivalence,
    cluster,
    exact_answer,
    exact_match,
    nli_equivalent,
    normalise_text,
    sentence_transformer,
)
from trueward.refine.multiview import (
    Critic,
    GaussianEncoder,
    MultiView,
    MultiViewConfig,
    MultiViewLoss,
    multi_view_loss,
)
from trueward.refine.synthetic import (
    Skipped,
    SyntheticPreference,
    SyntheticReport,
    SyntheticResult,
    confidence,
    reward_ranked_pairs,
    select_pair,
    synthetic_preferences,
)

__all__ = [
    "Critic",
    "EmbeddingEquivalence",
    "Equivalence",
    "GaussianEncoder",
    "MultiView",
    "MultiViewConfig",
    "MultiViewLoss",
    "NLIEquivalence",
    "Skipped",
    "SyntheticPreference",
    "SyntheticReport",
    "SyntheticResult",
    "cluster",
    "confidence",
    "exact_answer",
    "exact_match",
    "multi_view_loss",
    "nli_equivalent",
    "normalise_text",
    "reward_ranked_pairs",
    "select_pair",
    "sentence_transformer",
    "synthetic_preferences",
]
