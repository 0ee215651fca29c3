"""From a reward model and the policy's samples to a better one: every method by its name.

RLP, Lang et al. 2024, Eq. 1 (https://arxiv.org/abs/2403.19279), trains the reward model again on
the real preferences D and, from the policy's samples, on synthetic preferences (SPG), beside a
multi-view loss (UML), or on neither (the control). So a method is two ingredients, and whatever
posterior the reward model has (one head, heads, a deep ensemble, ...), both go into its training.
"""

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trueward.data.formats import (
    Completion,
    LoadReport,
    PreferenceRow,
    Prompt,
    load_preferences,
)
from trueward.evaluate.judges import Judge
from trueward.evaluate.policy_judge import policy_judge
from trueward.models.policy import Policy
from trueward.models.reward_function import Reward, fits_context, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.refine.equivalence import Equivalence
from trueward.refine.multiview import MultiView, MultiViewConfig, for_loss, idle_options
from trueward.refine.spg import SPGConfig, write_synthetic
from trueward.train.families import AuxiliaryOf, FamilyConfig, Maker, Reference, train_family
from trueward.train.reward import RewardConfig
from trueward.train.run_folder import RunFolder, finished_summary

logger = logging.getLogger(__name__)

RefineMethod = Literal[
    "control",
    "reward",
    "select_all",
    "rlaif",
    "spg",
    "uml",
    "infomax",
    "mvi",
    "contrastive",
    "spg_uml",
]
Samples = Sequence[tuple[Prompt, list[str]]]  # prompts with their completions from the policy


class Ingredients(NamedTuple):
    """What a method takes from the policy's samples."""

    pairs: Literal["", "spg", "select_all", "reward", "rlaif"]  # the rule of synthetic preferences
    views: Literal["", "uml", "infomax", "mvi", "contrastive"]  # the loss beside the ranking loss


METHODS: dict[RefineMethod, Ingredients] = {
    "control": Ingredients("", ""),  # trained again on D with another seed and nothing new
    "reward": Ingredients("reward", ""),  # self-training: the reward model's own labels
    "select_all": Ingredients("select_all", ""),
    "rlaif": Ingredients("rlaif", ""),
    "spg": Ingredients("spg", ""),
    "uml": Ingredients("", "uml"),
    "infomax": Ingredients("", "infomax"),
    "mvi": Ingredients("", "mvi"),
    "contrastive": Ingredients("", "contrastive"),
    "spg_uml": Ingredients("spg", "uml"),  # Eq. 1 permits both; the paper reports neither
}

LABELS: dict[RefineMethod, str] = {
    "control": "control",
    "reward": "Reward",
    "select_all": "Select-All",
    "rlaif": "RLAIF",
    "spg": "RLP-SPG",
    "uml": "RLP-UML",
    "infomax": "InfoMax",
    "mvi": "MVI",
    "contrastive": "CL",
    "spg_uml": "RLP-SPG + UML",
}


def refine_reward(
    method: RefineMethod,
    make: Maker,
    preferences: Sequence[PreferenceRow],
    drawn: Samples,
    *,
    rewards: Callable[..., Any],
    train: RewardConfig,
    output_dir: str | Path,
    family: FamilyConfig | None = None,
    spg: SPGConfig | None = None,
    uml: MultiViewConfig | None = None,
    policy: Policy | None = None,
    judge: Judge | None = None,
    equivalent: Equivalence | None = None,
    synthetic: Sequence[PreferenceRow] | None = None,
    pairs_dir: str | Path | None = None,
    routes: Mapping[str, str] | None = None,
    reference: Reference | None = None,
    report: LoadReport | None = None,
    selection: Sequence[PreferenceRow] = (),
    evaluation: Callable[[Reward], dict[str, float]] | None = None,
) -> Reward:
    """Train a reward model again on D and what the method takes from the policy's samples.

    Lang et al. 2024, Eq. 1 (https://arxiv.org/abs/2403.19279): synthetic preferences are pooled
    with D without weights. A killed run given the same folders goes on where it was.

    Args:
        method: A name in `METHODS`.
        make: Makes the untrained model; see `train_family`, and `warm_start`.
        preferences: D.
        drawn: The policy's samples of unlabelled prompts; not read by the control.
        rewards: `(prompts, completions) -> [batch]` of the current reward model, for the pairs.
        train: Options of the training; its seed is that of the pairs and the views too.
        output_dir: Of the trained model; see `train_family`.
        family: Which posterior; a single head by default.
        spg: Options of the pairs; its rule is the method's.
        uml: Options of the views; its loss is the method's.
        policy: Embeds the samples where the equivalence is `policy_states`.
        judge: Says which of two samples is better, for RLAIF; by default `policy` itself does.
        equivalent: Which samples say the same; by default what `spg` names.
        synthetic: Preferences made of the samples before, gated or reviewed since; by default they
            are made here.
        pairs_dir: Where the synthetic preferences are written; by default
            `output_dir/preferences`.
        routes: Of each prompt's key, the value by which `spg.routes` chooses its equivalence.
        reference: What members' scales are measured on.
        report: Receives the rows that do not fit.
        selection: Rows that `warm` selects its members on; see `train_family`.
        evaluation: Called with the trained reward.
    """
    require_composable(method, family or FamilyConfig())
    pairs, views = METHODS[method]
    rows = list(preferences)
    if pairs and synthetic is not None:
        rows += synthetic
    elif pairs:
        folder = Path(pairs_dir) if pairs_dir is not None else Path(output_dir) / "preferences"
        options = spg_for(spg or SPGConfig(), pairs)
        if pairs == "rlaif" and judge is None:
            if policy is None:
                raise ValueError("RLAIF needs the policy that judges, or a judge.")
            judge = policy_judge(policy)
        rows += synthetic_rows(
            options,
            rewards,
            drawn,
            folder,
            policy=policy,
            judge=judge,
            equivalent=equivalent,
            seed=train.seed,
            routes=routes,
        )
    auxiliary = None
    if views:
        uml = for_loss(uml or MultiViewConfig(), views, seed=train.seed)
        alike = None
        if uml.views == "cluster":
            alike = equivalent or (spg or SPGConfig()).build(
                policy,
                [texts for _, texts in drawn],
                prompts=[prompt for prompt, _ in drawn],
                routes_of=routes,
            )
        auxiliary = views_of(uml, drawn, alike)
    return train_family(
        make,
        rows,
        family or FamilyConfig(),
        train,
        output_dir=output_dir,
        reference=reference,
        report=report,
        selection=selection,
        evaluation=evaluation,
        auxiliary=auxiliary,
    )


def synthetic_rows(
    spg: SPGConfig,
    rewards: Callable[..., Any],
    drawn: Samples,
    folder: Path,
    *,
    policy: Policy | None,
    judge: Judge | None,
    equivalent: Equivalence | None,
    seed: int,
    routes: Mapping[str, str] | None = None,
) -> list[PreferenceRow]:
    """Make synthetic preferences in a folder of their own, unless they are there; return them.

    No pair at all is no error: the reward model is then trained on D alone, as the summary says.
    """
    if finished_summary(folder) is None:
        run = RunFolder(folder, command="spg", config=spg, free=("shard", "progress"))
        made = write_synthetic(
            spg,
            rewards,
            drawn,
            folder,
            policy=policy,
            judge=judge,
            equivalent=equivalent,
            seed=seed,
            routes_of=routes,
        )
        run.finish(made.report.as_dict(), seed=seed)
    summary = finished_summary(folder)
    assert summary is not None
    if not summary["metrics"]["accepted"]:
        return []
    return load_preferences(folder / "preferences.jsonl").rows


def views_of(uml: MultiViewConfig, drawn: Samples, equivalent: Equivalence | None) -> AuxiliaryOf:
    """Return what makes the multi-view loss beside a model; each member of an ensemble has one."""

    def beside(model: RewardModel, seed: int) -> MultiView:
        read = [
            (prompt, [t for t in texts if t.strip() and model.fits(prompt, t)])
            for prompt, texts in drawn
        ]
        lost = sum(len(texts) for _, texts in drawn) - sum(len(texts) for _, texts in read)
        if lost:
            logger.warning(
                "%d samples are blank or longer than the reward's context, and no views.", lost
            )
        width = model.backbone.config.get_text_config().hidden_size
        return MultiView(width, read, replace(uml, seed=seed), equivalent=equivalent)

    return beside


def spg_for(spg: SPGConfig, rule: Literal["", "spg", "select_all", "reward", "rlaif"]) -> SPGConfig:
    """Return the options of another rule: random pairs have no side to draw by its length."""
    if not rule:
        raise ValueError("This method makes no synthetic preferences: choose one that does.")
    if rule in ("reward", "rlaif"):
        return replace(spg, rule=rule, rejected="uniform")
    return replace(spg, rule=rule)


def require_own_options(
    spg: SPGConfig, uml: MultiViewConfig, methods: Collection[RefineMethod]
) -> None:
    """Refuse what methods set themselves, or none of them reads: it would be lost in silence.

    Raises:
        ValueError: Names the option.
    """
    if spg.rule != SPGConfig().rule:
        raise ValueError("spg.rule is what the method says: name the method, and leave it out.")
    if uml.loss != MultiViewConfig().loss:
        raise ValueError("uml.loss is what the method says: name the method, and leave it out.")
    if uml.seed != MultiViewConfig().seed:
        raise ValueError("uml.seed is the training's seed: set that one, and leave it out.")
    named = ", ".join(methods)
    losses = {METHODS[method].views for method in methods} - {""}
    idle = idle_options(uml, losses) if losses else [""] * (uml != MultiViewConfig())
    if idle:
        option = f"uml.{idle[0]}" if idle[0] else "A uml. option"
        raise ValueError(
            f"{option} would do nothing with the methods {named}: leave it out, or name a method "
            "whose loss reads it."
        )
    rules = {METHODS[method].pairs for method in methods}
    default = SPGConfig()
    if spg.gamma != default.gamma and "spg" not in rules:
        raise ValueError(
            f"spg.gamma would do nothing with the methods {named}: it is for spg and spg_uml."
        )
    if spg.rejected != default.rejected and not rules & {"spg", "select_all"}:
        raise ValueError(
            f"spg.rejected would do nothing with the methods {named}: it is for methods with "
            "clusters (spg, select_all, spg_uml)."
        )


def require_composable(method: RefineMethod, family: FamilyConfig) -> None:
    """Refuse views for a reward that cannot have them, before hours of other stages.

    Raises:
        ValueError: The family has no single last state, or its single head is given.
    """
    if not METHODS[method].views:
        return
    if family.family == "lora":
        raise ValueError(
            f"method={method} learns on one last state, and members of a LoRA ensemble have states "
            "of their own: choose another family, or a method without views."
        )
    if family.stage1:
        raise ValueError(
            f"method={method} learns beside the single head's training, and family.stage1 is a "
            "finished one: leave stage1 out."
        )


def rewards_of(
    reward: Reward, objective: Callable[[RewardPosterior], Tensor]
) -> Callable[[Sequence[Prompt], Sequence[Completion]], Tensor]:
    """Return the objective of a reward for each completion; NaN for one that it cannot read.

    Synthetic preferences leave such a completion out, and count it.
    """
    fits, posterior_of = fits_context(reward), posterior_function(reward)

    def rewards(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Tensor:
        asked = list(zip(prompts, completions, strict=True))
        read = [i for i, (prompt, completion) in enumerate(asked) if fits(prompt, completion)]
        found = torch.full((len(asked),), torch.nan)
        if read:
            posterior = posterior_of([asked[i][0] for i in read], [asked[i][1] for i in read])
            found[read] = objective(posterior).float().cpu()
        return found

    return rewards


def warm_start(current: Reward) -> Maker:
    """Return a maker whose models start from the current one instead of a fresh head.

    Raises:
        ValueError: The current reward is several models or a function.
    """
    if not isinstance(current, RewardModel):
        raise ValueError(
            "A warm start needs one reward model to start from: give a single model or heads on "
            "one backbone, or start from the SFT model."
        )
    start = current

    def make(**_options: object) -> RewardModel:
        return copy.deepcopy(start)

    return make


def with_facts(make: Maker, facts: Mapping[str, Any]) -> Maker:
    """Return a maker whose models know, for their cards, what they are trained on."""

    def made(**options: Any) -> RewardModel:
        model = make(**options)
        model.facts = dict(facts)
        return model

    return made
