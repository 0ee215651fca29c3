"""Weights averaged and interpolated; the shared start and the members."""

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trueward.data.formats import DataError, LoadReport, PreferenceRow
from trueward.models.heads import ScalarHead
from trueward.models.laplace import LaplaceHead
from trueward.models.reward_function import posterior_function
from trueward.models.reward_model import RewardModel
from trueward.models.sentence_backbone import SentenceBackbone, SentenceConfig
from trueward.models.weight_averaging import (
    MemberSettings,
    average_weights,
    diverse_members,
    interpolate_weights,
    probe_head,
    select_best,
    set_dropout,
    start_member,
)
from trueward.posterior import RewardPosterior
from trueward.testing import (
    tiny_backbone,
    tiny_classifier,
    tiny_preferences,
    tiny_texts,
    tiny_tokenizer,
)

TOKENIZER = tiny_tokenizer()
PROMPTS, COMPLETIONS = tiny_texts(6, seed=3), tiny_texts(6, seed=4)


def made(seed: int = 0, *, model_type: str = "llama", members: int = 0, **config) -> RewardModel:
    config = {"vocab_size": len(TOKENIZER)} | config
    backbone = tiny_backbone(model_type, seed=seed, **config)
    return RewardModel.from_backbone(backbone, TOKENIZER, members=members, seed=seed).eval()


def shaken(model: RewardModel, seed: int, scale: float = 0.01) -> RewardModel:
    """A copy with noise on every weight, as training from one start gives."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def with_head(model: RewardModel, seed: int) -> RewardModel:
    """The same backbone under a head of its own."""
    torch.manual_seed(seed)
    width = model.head.linear.in_features
    return RewardModel(copy.deepcopy(model.backbone), ScalarHead(width), TOKENIZER).eval()


def scores(model: RewardModel) -> torch.Tensor:
    return model.score(PROMPTS, COMPLETIONS, normalise=False).means


def rows(count: int, seed: int = 0) -> list[PreferenceRow]:
    made_rows = tiny_preferences(count, seed=seed)
    return [PreferenceRow(*row, where=f"made:{i}") for i, row in enumerate(made_rows)]


def assert_same_weights(model: RewardModel, other: RewardModel) -> None:
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


# ---- the average ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_average_of_a_model_with_itself_is_itself_to_the_last_bit(count: int) -> None:
    model = made()
    average = average_weights([model] * count)
    assert_same_weights(average, model)
    assert torch.equal(scores(average), scores(model))
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in average.parameters()}


def test_the_average_of_heads_on_one_backbone_scores_the_mean_of_their_scores() -> None:
    backbone = made()
    models = [with_head(backbone, seed) for seed in (1, 2, 3)]
    each = torch.stack([scores(model) for model in models])
    assert each.std(0).min() > 0.01
    torch.testing.assert_close(scores(average_weights(models)), each.mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("members", [0, 2])
def test_every_weight_is_the_mean_and_the_order_of_the_models_does_not_matter(
    members: int,
) -> None:
    start = made(members=members)
    models = [shaken(start, seed, 0.1) for seed in (1, 2, 3)]
    average = average_weights(models)
    for name, weight in average.state_dict().items():
        expected = torch.stack([m.state_dict()[name].double() for m in models]).mean(0)
        torch.testing.assert_close(weight.double(), expected, atol=0, rtol=6e-8)  # half a float32
    for order in itertools.permutations(models):
        assert_same_weights(average_weights(order), average)
    assert average.members == max(members, 1)


def test_models_may_come_one_by_one() -> None:
    models = [shaken(made(), seed) for seed in (1, 2, 3)]
    assert_same_weights(average_weights(m for m in models), average_weights(models))


def test_the_average_is_the_ensembles_mean_to_first_order() -> None:
    """Ramé et al. 2024, Eq. 3: their difference is of second order in the members' distance."""
    start = made()
    differences = []
    for scale in (0.001, 0.0005, 0.00025):
        models = [shaken(start, seed, scale) for seed in (1, 2)]
        mean = torch.stack([scores(m) for m in models]).mean(0)
        differences.append((scores(average_weights(models)) - mean).abs().mean())
    assert differences[0] / differences[1] == pytest.approx(4, rel=0.05)
    assert differences[1] / differences[2] == pytest.approx(4, rel=0.05)


def test_the_average_of_bfloat16_models_is_rounded_once() -> None:
    models = [shaken(made(), seed).bfloat16() for seed in (1, 2, 3)]
    average = average_weights(models)
    name = "backbone.layers.0.mlp.up_proj.weight"
    exact = torch.stack([m.state_dict()[name].double() for m in models]).mean(0)
    assert average.state_dict()[name].dtype == torch.bfloat16
    assert torch.equal(average.state_dict()[name], exact.float().bfloat16())


def test_adapters_are_averaged_by_what_they_add_not_by_their_factors() -> None:
    start = made()
    models = []
    for seed in (1, 2):
        model = copy.deepcopy(start)
        model.add_lora(2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero at the start
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        models.append(model)
    factors = [dict(model.named_parameters()) for model in models]
    layer = "layers.1.mlp.down_proj"
    inside = f"backbone.base_model.model.{layer}"
    deltas = [
        2 * f[f"{inside}.lora_B.default.weight"] @ f[f"{inside}.lora_A.default.weight"]
        for f in factors
    ]
    average = average_weights(models)
    expected = start.state_dict()[f"backbone.{layer}.weight"] + (deltas[0] + deltas[1]) / 2
    got = average.state_dict()[f"backbone.{layer}.weight"]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in average.parameters())
    assert_same_weights(average_weights([models[0]]), average_weights([models[0]] * 3))


def test_published_classifiers_are_averaged_with_the_heads_they_came_with() -> None:
    models = [
        RewardModel(tiny_classifier("bert", seed=seed, vocab_size=64), None, TOKENIZER)
        for seed in (1, 2)
    ]
    average = average_weights(models)
    weights = [m.backbone.classifier.weight for m in (*models, average)]
    torch.testing.assert_close(weights[2], (weights[0] + weights[1]) / 2)


def test_statistics_are_the_identity_until_they_are_measured_on_the_average() -> None:
    models = [with_head(made(), seed) for seed in (1, 2)]
    for model in models:
        model.set_normalisation(PROMPTS, COMPLETIONS)
    plain = average_weights(models)
    assert (plain.reward_mean.item(), plain.reward_std.item()) == (0, 1)
    average = average_weights(models, reference=(PROMPTS, COMPLETIONS))
    normalised = average.score(PROMPTS, COMPLETIONS, normalise=True)
    assert normalised.mean.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalised.mean.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    # The models' own would be wrong: heads that disagree vary less on average than each alone.
    assert average.reward_std < 0.98 * (models[0].reward_std + models[1].reward_std) / 2


def test_an_average_has_no_uncertainty_and_averages_of_groups_have() -> None:
    start = made()
    models = [shaken(start, seed, 0.05) for seed in range(4)]
    reference = (PROMPTS, COMPLETIONS)
    groups = [average_weights(models[i : i + 2], reference=reference) for i in (0, 2)]
    single = posterior_function(groups[0])(PROMPTS, COMPLETIONS)
    assert single.members == 1
    assert torch.equal(single.variance, torch.zeros(6))
    both = posterior_function(groups)(PROMPTS, COMPLETIONS)
    assert both.members == 2
    assert both.std.min() > 0
    expected = RewardPosterior.stack_members(
        [g.score(PROMPTS, COMPLETIONS, normalise=True) for g in groups]
    )
    assert torch.equal(both.means, expected.means)


def test_a_saved_and_loaded_average_gives_the_same_scores(tmp_path: Path) -> None:
    models = [shaken(made(), seed) for seed in (1, 2, 3)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    average = average_weights(models, reference=(PROMPTS, COMPLETIONS))
    average.save_pretrained(tmp_path / "average")
    loaded = RewardModel.from_pretrained(tmp_path / "average", device="cpu")
    assert torch.equal(scores(loaded), scores(average))
    for normalise in (True, False):
        torch.testing.assert_close(
            loaded.score(PROMPTS, COMPLETIONS, normalise=normalise).means,
            average.score(PROMPTS, COMPLETIONS, normalise=normalise).means,
        )
    paths = [tmp_path / str(i) for i in range(3)]
    from_disk = average_weights(RewardModel.from_pretrained(p, device="cpu") for p in paths)
    assert_same_weights(from_disk, average)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("members", [0, 2])
def test_a_fresh_model_averages_with_its_saved_self(
    tmp_path: Path, model_type: str, members: int
) -> None:
    model = made(model_type=model_type, members=members)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert_same_weights(average_weights([model, loaded]), model)


def test_the_card_tells_what_was_averaged(tmp_path: Path) -> None:
    models = [shaken(made(), seed) for seed in (1, 2)]
    for model, accuracy in zip(models, (0.71, 0.71), strict=True):
        model.facts = {"training data": "pairs.jsonl", "base": f"sft-{accuracy}", "acc": accuracy}
    models[1].facts["base"] = "other"
    average = average_weights(models)
    assert average.facts == {
        "training data": "pairs.jsonl",
        "weights": "mean of 2 models' (WARM)",
        "model 1": {"base": "sft-0.71", "acc": 0.71},  # equal numbers are not the average's
        "model 2": {"base": "other", "acc": 0.71},
    }
    average.save_pretrained(tmp_path)
    assert "| weights | mean of 2 models' (WARM) |" in (tmp_path / "README.md").read_text()
    assert RewardModel.from_pretrained(tmp_path, device="cpu").facts == average.facts
    again = average_weights([average, average])
    assert again.facts["model 1"]["weights"] == "mean of 2 models' (WARM)"


def test_the_average_has_no_dropout_and_the_shortest_context() -> None:
    models = [made(), made()]
    set_dropout(models[0], 0.5)
    models[1].max_length = 40
    average = average_weights(models)
    assert average.max_length == 40
    assert not average.training
    assert {m.attention_dropout for m in average.modules() if hasattr(m, "attention_dropout")} == {
        0.0
    }
    assert models[0].backbone.layers[0].self_attn.attention_dropout == 0.5


def other_tokenizer(**changes: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(TOKENIZER)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: made(members=2), r"model 1 and model 2 differ in their heads, scalar and gaussi"),
        (lambda: made(members=3), r"their heads, scalar and gaussian 3"),
        (lambda: made(model_type="gpt2"), "their backbones, LlamaModel and GPT2Model"),
        (lambda: made(layers=3), "the configuration's num_hidden_layers, 2 and 3"),
        (lambda: made(heads=2, num_key_value_heads=2, head_dim=16), "configuration's head_dim, 8"),
        (lambda: made(rms_norm_eps=1e-3), "the configuration's rms_norm_eps, 1e-06 and 0.001"),
        (lambda: made(vocab_size=400), "the configuration's vocab_size, 320 and 400"),
        (lambda: made().double(), r"embed_tokens.weight, torch.float32 of .* and torch.float64"),
    ],
)
def test_the_first_difference_is_named(other, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        average_weights([made(), other()])
    with pytest.raises(ValueError, match=told):
        interpolate_weights(made(), other(), 0.5)


def test_tokenizers_that_differ_are_named() -> None:
    model = made()
    longer = copy.deepcopy(TOKENIZER)
    longer.add_tokens(["<extra>"])
    others = {
        r"the token '<extra>' is None and 320": longer,
        "the tokenizer's pad_token, <pad> and <bos>": other_tokenizer(pad_token="<bos>"),
        "the tokenizer's chat template": other_tokenizer(chat_template="{{ messages }}"),
    }
    for told, tokenizer in others.items():
        other = RewardModel(model.backbone, model.head, tokenizer)
        with pytest.raises(ValueError, match=f"model 1 and model 3 differ in .*{told}"):
            average_weights([model, model, other])


def test_heads_without_a_mean_are_refused_with_what_to_do() -> None:
    model = made()
    body = tiny_backbone(vocab_size=len(TOKENIZER))
    others = {
        "fit it again on their average": RewardModel(body, LaplaceHead(32), TOKENIZER),
        "average single heads": RewardModel.from_backbone(
            body, TOKENIZER, lora_members=2, lora_rank=2
        ),
    }
    for told, other in others.items():
        with pytest.raises(ValueError, match=told):
            average_weights([other, other])
        with pytest.raises(ValueError, match=told):
            interpolate_weights(model, other, 0.5)


def on_an_encoder(encoder_seed: int, seed: int) -> RewardModel:
    """A scalar head on the trunk of a frozen encoder."""
    encoder = tiny_backbone("bert", seed=encoder_seed, vocab_size=len(TOKENIZER))
    torch.manual_seed(seed)
    config = SentenceConfig(encoder=encoder.config.to_dict(), hidden_size=16, layers=1)
    backbone = SentenceBackbone(config, encoder)
    return RewardModel.from_backbone(backbone, TOKENIZER, seed=seed).eval()


def test_what_is_frozen_stays_frozen_and_must_be_the_same() -> None:
    models = [on_an_encoder(0, seed) for seed in (1, 2)]
    before = [scores(model) for model in models]
    average = average_weights(models)
    trunks = [model.backbone.trunk[0].weight for model in (*models, average)]
    torch.testing.assert_close(trunks[2], (trunks[0] + trunks[1]) / 2)
    assert average.backbone.encoder is models[0].backbone.encoder
    assert not any(p.requires_grad for p in average.backbone.encoder.parameters())
    assert all(p.requires_grad for p in average.backbone.trunk.parameters())
    stranger = on_an_encoder(5, 2)
    for refused in (
        lambda: average_weights([*models, stranger]),
        lambda: interpolate_weights(models[0], stranger, 0.5),
    ):
        with pytest.raises(ValueError, match=r"different frozen encoders \(backbone.encoder"):
            refused()
    assert torch.equal(torch.stack([scores(model) for model in models]), torch.stack(before))


def test_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one model, got none"):
        average_weights([])


# ---- interpolation -------------------------------------------------------------------------


def test_the_ends_of_an_interpolation_are_the_models_and_its_middle_their_average() -> None:
    models = [shaken(made(), seed, 0.1) for seed in (1, 2)]
    for weight, model in zip((0.0, 1.0), models, strict=True):
        assert_same_weights(interpolate_weights(*models, weight), model)
    assert_same_weights(interpolate_weights(*models, 0.5), average_weights(models))
    quarter = interpolate_weights(*models, 0.25).state_dict()["head.linear.weight"]
    ends = [m.head.linear.weight.detach() for m in models]
    torch.testing.assert_close(quarter, 0.75 * ends[0] + 0.25 * ends[1])
    there, back = (
        interpolate_weights(*pair, weight).state_dict()
        for pair, weight in ((models, 0.3), (models[::-1], 0.7))
    )
    for name, value in there.items():
        torch.testing.assert_close(value, back[name], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_outside_the_line_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight must lie in \[0, 1\]"):
        interpolate_weights(made(), made(), weight)


# ---- the shared start and the members ------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_is_the_optimum_on_frozen_states_and_nothing_else_changes(training: bool) -> None:
    model, data = made(), rows(40)
    data = [dataclasses.replace(row, margin=0.5 * (i % 2)) for i, row in enumerate(data)]
    before = copy.deepcopy(model)
    model.train(training)
    assert probe_head(model, data, l2=0.02, centring=0.03) is model
    assert {module.training for module in model.modules()} == {training}
    for name, weight in before.backbone.state_dict().items():
        assert torch.equal(weight, model.backbone.state_dict()[name]), name
    # An independent reference: states of the plain backbone, the gradient by hand.
    states = []
    for row in data:
        for side in (row.chosen, row.rejected):
            ids = torch.tensor([[i for part in model.tokenize(row.prompt, side) for i in part]])
            states.append(before.backbone(input_ids=ids).last_hidden_state[0, -1].detach())
    chosen, rejected = torch.stack(states).double()[0::2], torch.stack(states).double()[1::2]
    margins = torch.tensor([row.margin for row in data], dtype=torch.float64)
    w = model.head.linear.weight[0].detach().double()
    d, s = chosen - rejected, chosen + rejected
    wrong = torch.sigmoid(margins - d @ w)
    ridge = 0.02 * d.square().mean() * w
    terms = [-(wrong[:, None] * d).mean(0), 0.06 * ((s @ w)[:, None] * s).mean(0), ridge]
    assert sum(terms).abs().max() < 1e-4 * max(t.abs().max() for t in terms)
    rewards = torch.cat([chosen @ w, rejected @ w])
    assert model.reward_mean.item() == pytest.approx(rewards.mean().item(), abs=1e-4)
    assert model.reward_std.item() == pytest.approx(rewards.std(correction=0).item(), rel=1e-4)
    assert model.facts == {"head started from": "a linear probe on 40 pairs"}


def test_the_probe_does_not_depend_on_the_head_before_or_the_order_of_the_rows() -> None:
    data, weights = rows(30), []
    for seed, order in ((1, data), (2, data[::-1])):
        model = probe_head(with_head(made(), seed), order)
        weights.append(model.head.linear.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=1e-3)


def test_the_probe_leaves_out_ties_and_rows_that_do_not_fit() -> None:
    data = rows(20)
    tie = dataclasses.replace(data[0], chosen="red", extra={"tie": True})
    long = dataclasses.replace(data[1], rejected="big dog " * 600, where="made:long")
    report = LoadReport("made")
    models = [made(), made()]
    probe_head(models[0], data)
    probe_head(models[1], [tie, long, *data], report=report)
    torch.testing.assert_close(models[0].head.linear.weight, models[1].head.linear.weight)
    assert [(p.kind, p.where) for p in report.problems] == [("over-long", "made:long")]
    with pytest.raises(DataError, match="None of 2 preference rows"):
        probe_head(made(), [tie, long])


def test_the_probe_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(ValueError, match="fits a scalar head, got gaussian 2"):
        probe_head(made(members=2), rows(4))
    with pytest.raises(ValueError, match="l2 must be above 0"):
        probe_head(made(), rows(4), l2=0.0)


def test_member_settings_by_hand() -> None:
    found = [(m.learning_rate, m.dropout, m.seed) for m in diverse_members(7, seed=5)]
    assert found == [
        (1e-5, 0.05, 5),
        (4e-5, 0.1, 6),
        (1e-4, 0.05, 7),
        (1e-5, 0.1, 8),
        (4e-5, 0.05, 9),
        (1e-4, 0.1, 10),
        (1e-5, 0.05, 11),
    ]


@pytest.mark.parametrize(("rates", "dropouts"), [(2, 2), (4, 2), (3, 3), (4, 6), (3, 1)])
def test_every_combination_comes_once_before_any_comes_again(rates: int, dropouts: int) -> None:
    members = diverse_members(
        2 * rates * dropouts,
        learning_rates=[1e-5 * (i + 1) for i in range(rates)],
        dropouts=[0.1 * i for i in range(dropouts)],
    )
    pairs = [(m.learning_rate, m.dropout) for m in members]
    half = rates * dropouts
    assert len(set(pairs[:half])) == len(set(pairs[half:])) == half
    assert len({m.seed for m in members}) == 2 * half


def test_diverse_members_refuses_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="at least 1 member, got 0"):
        diverse_members(0)
    with pytest.raises(ValueError, match="at least one learning rate and one dropout"):
        diverse_members(2, dropouts=[])


def test_a_member_is_a_copy_with_its_own_dropout() -> None:
    start = made()
    member = start_member(start, MemberSettings(learning_rate=1e-5, dropout=0.5, seed=1))
    assert_same_weights(member, start)
    assert start.backbone.layers[0].self_attn.attention_dropout == 0.0
    batch_scores = []
    for model in (start, member):
        with torch.no_grad():
            model.train()
            from trueward.data.packing import Group, pack

            batch = pack([Group([5, 6, 7, 8], [[9, 10], [11]])], pad_id=0)
            batch_scores.append([model(batch).means for _ in "12"])
    assert torch.equal(*batch_scores[0])
    assert not torch.equal(*batch_scores[1])
    assert torch.equal(scores(member.eval()), scores(start.eval()))


def test_baklava_members_start_from_another_checkpoint_under_the_shared_head() -> None:
    start = made()
    checkpoint = shaken(start, 7).backbone
    settings = MemberSettings(learning_rate=1e-5, dropout=0.0, seed=1)
    member = start_member(start, settings, backbone=checkpoint)
    assert torch.equal(member.head.linear.weight, start.head.linear.weight)
    for name, weight in checkpoint.state_dict().items():
        assert torch.equal(weight, member.backbone.state_dict()[name])
    assert member.backbone is not checkpoint
    with pytest.raises(ValueError, match="num_hidden_layers"):
        start_member(start, settings, backbone=made(layers=1).backbone)
    start.add_lora(2)
    with pytest.raises(ValueError, match="replaces the start's adapters"):
        start_member(start, settings, backbone=checkpoint)


def test_dropout_needs_a_place_and_a_probability() -> None:
    gpt2 = made(model_type="gpt2")
    set_dropout(gpt2, 0.25)
    assert {m.p for m in gpt2.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        set_dropout(gpt2, 1.0)
    with pytest.raises(ValueError, match=r"Linear has no dropout to set to 0\.1"):
        set_dropout(torch.nn.Linear(2, 2), 0.1)
    set_dropout(torch.nn.Linear(2, 2), 0.0)


def test_selection_by_hand() -> None:
    names, accuracies = ["a", "b", "c", "d", "e"], [0.6, 0.8, 0.7, 0.8, 0.5]
    assert select_best(names, accuracies, 1) == ["b"]
    assert select_best(names, accuracies, 3) == ["b", "d", "c"]
    assert select_best(names, accuracies, 5) == ["b", "d", "c", "a", "e"]


@pytest.mark.parametrize(
    ("accuracies", "count", "told"),
    [
        ([0.5], 1, "1 accuracies of 2 models"),
        ([0.5, math.nan], 1, "accuracy of model 2 is not finite"),
        ([0.5, 0.6], 0, "between 1 and the 2 models, got 0"),
        ([0.5, 0.6], 3, "between 1 and the 2 models, got 3"),
    ],
)
def test_selection_refuses(accuracies: list[float], count: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        select_best(["a", "b"], accuracies, count)
