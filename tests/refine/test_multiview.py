import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from trueward.data.formats import Completion, DataError, PreferenceRow, Prompt
from trueward.losses.information import gaussian_symmetric_kl, info_nce_loss, jensen_shannon_mi
from trueward.models.backbone import make_batch
from trueward.models.reward_model import RewardModel
from trueward.refine.equivalence import exact_match
from trueward.refine.multiview import (
    LOSSES,
    Critic,
    GaussianEncoder,
    LossName,
    MultiView,
    MultiViewConfig,
    infomax_loss,
    multi_view_infomax_loss,
    multi_view_loss,
    require_one_state,
    scheduled_coefficient,
)
from trueward.testing import tiny_backbone, tiny_preferences, tiny_texts, tiny_tokenizer
from trueward.train.reward import RewardConfig, train_reward

HIDDEN = 32
SMALL = MultiViewConfig(latent=4, width=16, prompts_per_batch=4)


ALL: list[LossName] = ["uml", "infomax", "mvi", "contrastive"]


def reward_model(**options: int | float) -> RewardModel:
    return RewardModel.from_backbone(tiny_backbone(), tiny_tokenizer(), **options)


def samples(prompts: int = 6, completions: int = 3) -> list[tuple[Prompt, list[Completion]]]:
    return [
        (f"prompt {i}: why?", list(tiny_texts(completions, seed=10 + i, words=(3, 8))))
        for i in range(prompts)
    ]


class Zero(nn.Module):
    def forward(self, z_1: Tensor, z_2: Tensor) -> Tensor:
        return torch.zeros(len(z_1))


class Product(nn.Module):
    """A critic that sees one number of each: T = z_1 z_2."""

    def forward(self, z_1: Tensor, z_2: Tensor) -> Tensor:
        return (z_1 * z_2).sum(1)


def gaussians(
    batch: int, latent: int = 2, seed: int = 0
) -> tuple[Float[Tensor, "batch latent"], ...]:
    noise = torch.Generator().manual_seed(seed)
    mean_1, mean_2, z_1, z_2 = (torch.randn(batch, latent, generator=noise) for _ in range(4))
    std_1, std_2 = (0.5 + torch.rand(batch, latent, generator=noise) for _ in range(2))
    return mean_1, std_1, z_1, mean_2, std_2, z_2


# --- the equation --------------------------------------------------------------------------------


def test_a_critic_that_knows_nothing_gives_two_log_two() -> None:
    same = torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 2)
    terms = multi_view_loss(*same, *same, Zero(), skl_coef=1.0)
    torch.testing.assert_close(terms.mutual_information, torch.full((3,), -2 * math.log(2)))
    torch.testing.assert_close(terms.symmetric_kl, torch.zeros(3))
    torch.testing.assert_close(terms.loss, torch.full((3,), 2 * math.log(2)))


def test_multi_view_loss_by_hand() -> None:
    # Two prompts, one dimension: mean 0 against 1, std 1 against 2 has divergence 0.875.
    mean_1, mean_2 = torch.zeros(2, 1), torch.ones(2, 1)
    std_1, std_2 = torch.ones(2, 1), torch.full((2, 1), 2.0)
    z_1, z_2 = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [5.0]])
    terms = multi_view_loss(mean_1, std_1, z_1, mean_2, std_2, z_2, Product(), skl_coef=0.5)
    # Joint 1*2 and 3*5; with the first views rolled by one, 3*2 and 1*5.
    expected = [-softplus(-2) - softplus(6), -softplus(-15) - softplus(5)]
    torch.testing.assert_close(terms.mutual_information, torch.tensor(expected))
    torch.testing.assert_close(terms.symmetric_kl, torch.full((2,), 0.875))
    torch.testing.assert_close(terms.loss, torch.tensor([-e + 0.5 * 0.875 for e in expected]))


def test_the_critic_reads_the_first_view_first() -> None:
    class FirstOnly(nn.Module):
        def forward(self, z_1: Tensor, z_2: Tensor) -> Tensor:
            return z_1[:, 0]

    mean_1, std_1, z_1, mean_2, std_2, z_2 = gaussians(5)
    terms = multi_view_loss(mean_1, std_1, z_1, mean_2, std_2, z_2, FirstOnly(), skl_coef=0.0)
    expected = jensen_shannon_mi(z_1[:, 0], z_1[:, 0].roll(1))
    torch.testing.assert_close(terms.mutual_information, expected)


def test_without_divergence_only_mutual_information_is_left() -> None:
    views = gaussians(4)
    terms = multi_view_loss(*views, Product(), skl_coef=0.0)
    torch.testing.assert_close(terms.loss, -terms.mutual_information)
    torch.testing.assert_close(multi_view_infomax_loss(views[2], views[5], Product()), terms.loss)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_multi_view_infomax_by_hand() -> None:
    # Joint 1*2 and 3*5; with the first views rolled by one, 3*2 and 1*5.
    z_1, z_2 = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [5.0]])
    losses = multi_view_infomax_loss(z_1, z_2, Product())
    expected = [softplus(-2) + softplus(6), softplus(-15) + softplus(5)]
    torch.testing.assert_close(losses, torch.tensor(expected))
    nothing = multi_view_infomax_loss(z_1, z_2, Zero())
    torch.testing.assert_close(nothing, torch.full((2,), 2 * math.log(2)))


def test_infomax_by_hand() -> None:
    class Chosen(nn.Module):
        """T = h_2 - 2 z, which tells the two apart."""

        def forward(self, hidden: Tensor, z: Tensor) -> Tensor:
            return hidden[:, 1] - 2 * z[:, 0]

    hidden = torch.tensor([[9.0, 4.0, 9.0], [9.0, 1.0, 9.0], [9.0, 0.0, 9.0]])
    z = torch.tensor([[1.0], [0.5], [-1.0]])
    # Joint 4-2, 1-1 and 0+2; of the states of the row before, 0-2, 4-1 and 1+2.
    expected = [softplus(-2) + softplus(-2), softplus(0) + softplus(3), softplus(-2) + softplus(3)]
    torch.testing.assert_close(infomax_loss(hidden, z, Chosen()), torch.tensor(expected))
    nothing = infomax_loss(hidden, z, Zero())
    torch.testing.assert_close(nothing, torch.full((3,), 2 * math.log(2)))


def test_the_sampled_divergence_agrees_with_the_closed_form_on_average() -> None:
    mean_1, std_1, _, mean_2, std_2, _ = gaussians(3)
    noise = torch.Generator().manual_seed(1)
    total = torch.zeros(3)
    for _ in range(4000):
        z_1 = mean_1 + std_1 * torch.randn(3, 2, generator=noise)
        z_2 = mean_2 + std_2 * torch.randn(3, 2, generator=noise)
        views = mean_1, std_1, z_1, mean_2, std_2, z_2
        total += multi_view_loss(*views, Zero(), skl_coef=1.0, monte_carlo=True).symmetric_kl
    expected = gaussian_symmetric_kl(mean_1, std_1, mean_2, std_2)
    torch.testing.assert_close(total / 4000, expected, rtol=0.1, atol=0.05)


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="negative would be the positive itself"):
        multi_view_loss(*gaussians(1), Product(), skl_coef=1.0)
    one = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"at least 2 prompts in a batch, got 1.* positive itself"):
        multi_view_infomax_loss(one, one, Product())
    with pytest.raises(ValueError, match=r"at least 2 prompts in a batch, got 1.* positive itself"):
        infomax_loss(one, one, Product())
    with pytest.raises(ValueError, match="prompts_per_batch must be at least 2, got 1"):
        MultiViewConfig(prompts_per_batch=1)


def test_a_trained_critic_tells_correlated_views_from_independent_ones() -> None:
    def train(correlation: float) -> tuple[float, float]:
        noise = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        critic = Critic(1, width=32)
        optimiser = torch.optim.Adam(critic.parameters(), lr=1e-2)
        estimates = []
        still = torch.zeros(256, 1), torch.ones(256, 1)
        for _ in range(150):
            z_1, own = torch.randn(2, 256, 1, generator=noise)
            z_2 = correlation * z_1 + math.sqrt(1 - correlation**2) * own
            terms = multi_view_loss(*still, z_1, *still, z_2, critic, skl_coef=1.0)
            assert (terms.mutual_information <= 0).all()
            optimiser.zero_grad()
            terms.loss.mean().backward()
            optimiser.step()
            estimates.append(terms.mutual_information.mean().item())
        return sum(estimates[:5]) / 5, sum(estimates[-20:]) / 20

    start, correlated = train(0.95)
    _, independent = train(0.0)
    assert start < -1.2
    # At the optimum, 2 D - 2 log 2 by quadrature: -0.802 for 0.95, -1.386 for independent views.
    assert -0.9 < correlated < -0.72
    assert independent == pytest.approx(-2 * math.log(2), abs=0.03)


def test_a_trained_critic_tells_which_state_a_draw_came_from() -> None:
    noise = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    critic = Critic(3, 1, width=32)
    optimiser = torch.optim.Adam(critic.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        hidden, own = torch.randn(256, 3, generator=noise), torch.randn(256, 1, generator=noise)
        z = 0.95 * hidden[:, 1:2] + math.sqrt(1 - 0.95**2) * own
        loss = infomax_loss(hidden, z, critic)
        assert (loss >= 0).all()
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        losses.append(loss.mean().item())
    assert sum(losses[:5]) / 5 > 1.2
    assert 0.72 < sum(losses[-20:]) / 20 < 0.9  # 0.802 at the optimum, as above


# --- the coefficients ----------------------------------------------------------------------------


def test_a_linear_schedule_by_hand() -> None:
    def at(step: int) -> float:
        return scheduled_coefficient(step, start=2.0, end=-1.0, steps=10, schedule="linear")

    assert [at(step) for step in (0, 5, 10, 11, 1000)] == [2.0, 0.5, -1.0, -1.0, -1.0]
    assert at(1) == pytest.approx(1.7)
    assert at(-3) == 2.0


def test_an_exponential_schedule_by_hand_and_as_the_bottleneck_s_authors_write_it() -> None:
    def at(step: int) -> float:
        return scheduled_coefficient(step, start=1e-3, end=1.0, steps=90, schedule="exponential")

    assert at(0) == pytest.approx(1e-3)
    assert at(30) == pytest.approx(1e-2)  # a factor of ten in each third
    assert at(45) == pytest.approx(math.sqrt(1e-3))
    assert at(60) == pytest.approx(1e-1)
    assert (at(90), at(91)) == (1.0, 1.0)
    for step in (1, 17, 89):  # theirs, by logarithms of base ten
        assert at(step) == pytest.approx(10 ** (-3 + step * 3 / 90))
    down = scheduled_coefficient(1, start=0.4, end=0.1, steps=2, schedule="exponential")
    assert down == pytest.approx(0.2)


def test_a_constant_schedule_is_its_end_and_reads_nothing_else() -> None:
    for step in (0, 1, 50):
        assert scheduled_coefficient(step, start=0.0, end=0.7, steps=0, schedule="constant") == 0.7


def test_schedules_without_steps_or_through_zero_are_refused() -> None:
    for schedule in ("linear", "exponential"):
        with pytest.raises(ValueError, match=f"a {schedule} schedule needs at least 1 step, got 0"):
            scheduled_coefficient(1, start=0.1, end=1.0, steps=0, schedule=schedule)
    for start, end in ((0.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="between values above 0"):
            scheduled_coefficient(1, start=start, end=end, steps=5, schedule="exponential")


# --- the modules ---------------------------------------------------------------------------------


def test_encoder_has_two_separate_three_layer_networks() -> None:
    encoder = GaussianEncoder(8, latent=3, width=5)
    mean, std = encoder(torch.randn(7, 8))
    assert mean.shape == std.shape == (7, 3)
    one_network = (8 * 5 + 5) + (5 * 5 + 5) + (5 * 3 + 3)
    assert sum(p.numel() for p in encoder.parameters()) == 2 * one_network
    for network in (encoder.mean, encoder.raw_std):
        nn.init.zeros_(network[-1].weight)
    nn.init.constant_(encoder.mean[-1].bias, 2.0)
    nn.init.constant_(encoder.raw_std[-1].bias, -200.0)
    mean, std = encoder(torch.randn(7, 8))
    torch.testing.assert_close(mean, torch.full((7, 3), 2.0))
    torch.testing.assert_close(std, torch.full((7, 3), 1e-7), rtol=1e-3, atol=0.0)
    nn.init.zeros_(encoder.raw_std[-1].bias)
    torch.testing.assert_close(encoder(torch.randn(7, 8))[1], torch.full((7, 3), math.log(2)))


def test_encoder_is_not_linear() -> None:
    torch.manual_seed(0)
    encoder = GaussianEncoder(8, latent=3, width=16)
    a, b = torch.randn(2, 1, 8)
    zero = encoder.mean(torch.zeros(1, 8))
    assert (encoder.mean(a + b) + zero - encoder.mean(a) - encoder.mean(b)).abs().max() > 1e-3


def test_critic_scores_ordered_pairs() -> None:
    torch.manual_seed(0)
    critic = Critic(3, width=5)
    z_1, z_2 = torch.randn(2, 4, 3)
    assert critic(z_1, z_2).shape == (4,)
    assert not torch.allclose(critic(z_1, z_2), critic(z_2, z_1))
    assert sum(p.numel() for p in critic.parameters()) == (6 * 5 + 5) + (5 * 5 + 5) + (5 + 1)
    uneven = Critic(2, 4, width=5)
    assert uneven(torch.randn(3, 2), torch.randn(3, 4)).shape == (3,)


def test_defaults_are_those_of_the_specification() -> None:
    config = MultiViewConfig()
    assert (config.weight, config.skl_coef, config.latent, config.width) == (0.5, 1.0, 64, 1024)
    module = MultiView(HIDDEN, samples(), config)
    widths = [m.weight.shape for m in module.critic.score if isinstance(m, nn.Linear)]
    assert widths == [(1024, 128), (1024, 1024), (1, 1024)]
    assert (config.loss, config.views) == ("uml", "distinct")
    assert (config.schedule, config.skl_schedule, config.skl_start) == (
        "constant",
        "constant",
        1e-3,
    )


def test_each_loss_has_the_networks_that_it_trains_and_no_others() -> None:
    shapes = {}
    for loss in ALL:
        module = MultiView(HIDDEN, samples(), replace(SMALL, loss=loss))
        networks = module.named_children()
        shapes[loss] = {name: tuple(next(net.parameters()).shape) for name, net in networks}
    views = {"encoder": (16, 32), "critic": (16, 8)}
    assert shapes == {
        "uml": views,
        "mvi": views,
        "infomax": {"encoder": (16, 32), "critic": (16, 36)},  # states of 32, draws of 4
        "contrastive": {"projection": (16, 32)},
    }
    assert list(LOSSES) == ALL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latent", 0),
        ("width", 0),
        ("weight", -1.0),
        ("skl_coef", math.inf),
        ("weight", math.nan),
        ("skl_start", -1e-3),
        ("temperature", 0.0),
        ("temperature", math.inf),
    ],
)
def test_wrong_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        MultiViewConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["loss", "views", "schedule", "skl_schedule"])
def test_an_unknown_name_is_an_error_that_lists_the_known(name: str) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'none'"):
            MultiViewConfig(**{name: "none"})  # type: ignore[arg-type]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss": "mvi", "monte_carlo": True}, "monte_carlo is read with loss='uml'"),
        ({"loss": "mvi", "skl_coef": 0.5}, "skl_coef is read with loss='uml'"),
        ({"loss": "infomax", "skl_start": 0.5}, "skl_start is read with loss='uml'"),
        ({"loss": "infomax", "skl_steps": 5}, "skl_steps is read with loss='uml'"),
        (
            {"loss": "contrastive", "skl_schedule": "linear", "skl_steps": 5},
            "skl_schedule is read with loss='uml'",
        ),
        ({"loss": "mvi", "temperature": 0.2}, "temperature is read with loss='contrastive'"),
        ({"skl_start": 0.5}, "skl_start is where a linear or exponential skl_schedule begins"),
        ({"skl_steps": 5}, "skl_steps=5 would do nothing with skl_schedule='constant'"),
        ({"warmup_steps": 5}, "warmup_steps=5 would do nothing with schedule='constant'"),
        ({"schedule": "linear"}, "schedule='linear' needs warmup_steps"),
        ({"skl_schedule": "exponential"}, "skl_schedule='exponential' needs skl_steps"),
        (
            {"skl_schedule": "exponential", "skl_steps": 5, "skl_start": 0.0},
            "between values above 0, got skl_start=0.0",
        ),
        (
            {"skl_schedule": "exponential", "skl_steps": 5, "skl_coef": 0.0},
            "between values above 0.*skl_coef=0.0",
        ),
    ],
)
def test_options_that_do_nothing_or_lack_their_partner_are_refused(
    options: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        MultiViewConfig(**options)  # type: ignore[arg-type]


def test_options_with_their_partner_are_taken() -> None:
    MultiViewConfig(loss="contrastive", temperature=0.2)
    MultiViewConfig(skl_schedule="exponential", skl_steps=5, skl_start=0.1, monte_carlo=True)
    MultiViewConfig(skl_schedule="linear", skl_steps=5, skl_start=0.0, skl_coef=0.0)
    MultiViewConfig(loss="mvi", schedule="linear", warmup_steps=3, views="cluster")


# --- MultiView -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_name", ALL)
def test_the_gradient_reaches_the_backbone_and_every_weight_but_not_the_reward_head(
    loss_name: LossName,
) -> None:
    model = reward_model()
    module = MultiView(HIDDEN, samples(), replace(SMALL, loss=loss_name))
    loss, _ = module(model, 0)
    loss.backward()
    assert model.backbone.embed_tokens.weight.grad.abs().max() > 0
    for layer in model.backbone.layers:
        assert layer.self_attn.v_proj.weight.grad.abs().max() > 0
    for parameter in module.parameters():
        assert parameter.grad is not None
        # The critic's own constant is the same for every pair: its gradient may be about zero.
        assert parameter.numel() == 1 or parameter.grad.abs().max() > 0
    assert model.head is not None
    assert model.head.linear.weight.grad is None


def states_of_single_rows(
    module: MultiView, model: RewardModel, step: int
) -> tuple[Float[Tensor, "completion hidden"], torch.Generator, list[str]]:
    """The states of a step, each completion in a row of its own and no code of `forward`."""
    import hashlib

    from trueward.data.packing import Group

    digest = hashlib.sha256(f"multiview {module.config.seed} {step}".encode()).digest()
    noise = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = module.draw(noise)
    states = []
    for prompt, *views in drawn:
        for view in views:
            group = Group(
                *(lambda t: (t.prompt_ids, [t.completion_ids]))(model.tokenize(prompt, view))
            )
            batch = make_batch(model.backbone, [group], pad_id=0, shared_prefix=False)
            states.append(model.hidden(batch))
    return torch.cat(states), noise, [str(prompt) for prompt, *_ in drawn]


def estimate(joint: Tensor, product: Tensor) -> Tensor:
    return -nn.functional.softplus(-joint) - nn.functional.softplus(product)


FIRST, SECOND = slice(0, None, 2), slice(1, None, 2)


def expected_terms(
    module: MultiView, model: RewardModel, step: int
) -> tuple[Float[Tensor, " batch"], list[str]]:
    """The loss once more, by other code."""
    states, noise, prompts = states_of_single_rows(module, model, step)
    mean, std = module.encoder(states)
    z = mean + std * torch.randn(mean.shape, generator=noise)
    joint = module.critic(z[FIRST], z[SECOND])
    product = module.critic(torch.cat([z[FIRST][-1:], z[FIRST][:-1]]), z[SECOND])
    kl = gaussian_symmetric_kl(mean[FIRST], std[FIRST], mean[SECOND], std[SECOND])
    return torch.stack([estimate(joint, product).mean(), kl.mean()]), prompts


@pytest.mark.parametrize("step", [0, 3])
def test_forward_is_the_equation_on_the_states_of_single_rows(step: int) -> None:
    model = reward_model()
    config = MultiViewConfig(
        weight=0.25, latent=4, width=16, skl_coef=2.0, prompts_per_batch=4, seed=3
    )
    module = MultiView(HIDDEN, samples(), config)
    (information, kl), prompts = expected_terms(module, model, step)
    loss, metrics = module(model, step)
    assert len(set(prompts)) == 4
    assert metrics["uml/jsd"] == pytest.approx(information.item(), abs=1e-5)
    assert metrics["uml/symmetric_kl"] == pytest.approx(kl.item(), abs=1e-5)
    assert metrics["uml/loss"] == pytest.approx(-information.item() + 2 * kl.item(), abs=1e-5)
    assert loss.item() == pytest.approx(0.25 * metrics["uml/loss"], abs=1e-6)
    assert (metrics["uml/weight"], metrics["uml/skl_coef"]) == (0.25, 2.0)
    assert all(type(value) is float for value in metrics.values())


def test_mvi_is_uml_without_its_divergence_which_is_only_measured() -> None:
    model = reward_model()
    mvi = MultiView(HIDDEN, samples(), replace(SMALL, loss="mvi"))
    (information, kl), _ = expected_terms(mvi, model, 2)
    loss, metrics = mvi(model, 2)
    assert metrics["uml/loss"] == pytest.approx(-information.item(), abs=1e-5)
    assert metrics["uml/jsd"] == pytest.approx(information.item(), abs=1e-5)
    assert metrics["uml/symmetric_kl"] == pytest.approx(kl.item(), abs=1e-5)
    assert "uml/skl_coef" not in metrics
    # From the same seed, the same weights and draws.
    without = MultiView(HIDDEN, samples(), replace(SMALL, skl_coef=0.0))
    assert without(model, 2)[0].item() == loss.item()


def test_infomax_is_the_mean_over_the_views_of_state_against_draw() -> None:
    model = reward_model()
    module = MultiView(HIDDEN, samples(), replace(SMALL, loss="infomax"))
    states, noise, _ = states_of_single_rows(module, model, 1)
    mean, std = module.encoder(states)
    z = mean + std * torch.randn(mean.shape, generator=noise)
    information = torch.stack(
        [
            estimate(
                module.critic(states[view], z[view]),
                # A negative is the same view of the prompt before.
                module.critic(torch.cat([states[view][-1:], states[view][:-1]]), z[view]),
            )
            for view in (FIRST, SECOND)
        ]
    ).mean()
    kl = gaussian_symmetric_kl(mean[FIRST], std[FIRST], mean[SECOND], std[SECOND]).mean()
    loss, metrics = module(model, 1)
    assert metrics["uml/loss"] == pytest.approx(-information.item(), abs=1e-5)
    assert metrics["uml/jsd_state"] == pytest.approx(information.item(), abs=1e-5)
    assert metrics["uml/symmetric_kl"] == pytest.approx(kl.item(), abs=1e-5)
    assert loss.item() == pytest.approx(0.5 * metrics["uml/loss"], abs=1e-6)
    assert not {"uml/jsd", "uml/skl_coef"} & set(metrics)


def test_contrastive_is_info_nce_of_the_projected_states() -> None:
    model = reward_model()
    module = MultiView(HIDDEN, samples(), replace(SMALL, loss="contrastive", temperature=0.7))
    states, _, _ = states_of_single_rows(module, model, 1)
    z = module.projection(states)
    expected = info_nce_loss(z[FIRST], z[SECOND], temperature=0.7).mean().item()
    loss, metrics = module(model, 1)
    assert metrics["uml/loss"] == pytest.approx(expected, abs=1e-5)
    assert loss.item() == pytest.approx(0.5 * expected, abs=1e-5)
    assert set(metrics) == {"uml/loss", "uml/weight", "uml/reward_gap"}


def test_the_coefficients_of_a_step_follow_their_schedules_and_are_logged() -> None:
    model = reward_model()
    config = MultiViewConfig(
        latent=4,
        width=16,
        prompts_per_batch=4,
        weight=0.8,
        schedule="linear",
        warmup_steps=4,
        skl_coef=10.0,
        skl_schedule="exponential",
        skl_start=0.1,
        skl_steps=4,
    )
    module = MultiView(HIDDEN, samples(), config)
    for step, weight, skl_coef in ((1, 0.2, 10**-0.5), (2, 0.4, 1.0), (4, 0.8, 10.0), (9, 0.8, 10)):
        loss, metrics = module(model, step)
        assert metrics["uml/weight"] == pytest.approx(weight)
        assert metrics["uml/skl_coef"] == pytest.approx(skl_coef)
        expected = -metrics["uml/jsd"] + skl_coef * metrics["uml/symmetric_kl"]
        assert metrics["uml/loss"] == pytest.approx(expected, rel=1e-4)
        assert loss.item() == pytest.approx(weight * expected, rel=1e-4)


@pytest.mark.parametrize("members", [0, 3])
def test_reward_gap_is_the_mean_distance_of_the_views_scores(members: int) -> None:
    model = reward_model(members=members)
    module = MultiView(HIDDEN, samples(), SMALL)
    drawn = module.draw(step_noise(module, 5))
    prompts = [prompt for prompt, *_ in drawn for _ in range(2)]
    views = [view for _, *both in drawn for view in both]
    rewards = model.score(prompts, views, normalise=False).mean
    expected = (rewards[FIRST] - rewards[SECOND]).abs().mean().item()
    assert expected > 0.01
    model.train()
    for loss in ALL:
        _, metrics = MultiView(HIDDEN, samples(), replace(SMALL, loss=loss))(model, 5)
        assert metrics["uml/reward_gap"] == pytest.approx(expected, abs=1e-5)


def step_noise(module: MultiView, step: int) -> torch.Generator:
    from trueward.refine.multiview import _step_generator

    return _step_generator(module.config.seed, step)


def test_reward_gap_is_without_dropout_and_leaves_the_head_in_training() -> None:
    model = reward_model(members=3, head_dropout=0.5)
    module = MultiView(HIDDEN, samples(), SMALL)
    model.eval()
    still = module(model, 0)[1]["uml/reward_gap"]
    assert model.head is not None
    assert not model.head.training
    model.train()
    before = torch.get_rng_state()
    assert module(model, 0)[1]["uml/reward_gap"] == still
    assert model.head.training
    assert torch.equal(torch.get_rng_state(), before)


def test_metrics_lie_where_they_must() -> None:
    _, metrics = MultiView(HIDDEN, samples(), SMALL)(reward_model(), 0)
    assert metrics["uml/jsd"] == pytest.approx(-2 * math.log(2), abs=0.05)
    assert metrics["uml/symmetric_kl"] >= 0


def test_the_sampled_divergence_is_used_where_asked() -> None:
    model = reward_model()
    options = {"latent": 4, "width": 16, "prompts_per_batch": 4}
    closed = MultiView(HIDDEN, samples(), MultiViewConfig(**options))  # type: ignore[arg-type]
    drawn = MultiView(HIDDEN, samples(), MultiViewConfig(monte_carlo=True, **options))  # type: ignore[arg-type]
    a, b = closed(model, 0)[1], drawn(model, 0)[1]
    assert a["uml/jsd"] == b["uml/jsd"]
    assert a["uml/symmetric_kl"] != b["uml/symmetric_kl"]


def test_a_step_hangs_on_seed_and_number_alone() -> None:
    model = reward_model()
    module = MultiView(HIDDEN, samples(), SMALL)
    unbroken = [module(model, step)[0].item() for step in range(4)]
    torch.manual_seed(99)
    resumed = MultiView(HIDDEN, samples(), SMALL)
    resumed.load_state_dict(module.state_dict())
    assert [resumed(model, step)[0].item() for step in (2, 3)] == unbroken[2:]
    assert len(set(unbroken)) == 4
    other = MultiView(HIDDEN, samples(), MultiViewConfig(latent=4, width=16, seed=1))
    other.load_state_dict(module.state_dict())
    assert other(model, 0)[0].item() != unbroken[0]


def test_training_and_resuming_end_with_the_same_weights() -> None:
    def train(model: RewardModel, module: MultiView, steps: range) -> None:
        # Plain SGD keeps no state of its own.
        optimiser = torch.optim.SGD([*model.parameters(), *module.parameters()], lr=0.05)
        for step in steps:
            optimiser.zero_grad()
            module(model, step)[0].backward()
            optimiser.step()

    model, module = reward_model(), MultiView(HIDDEN, samples(), SMALL)
    train(model, module, range(4))
    first, part = reward_model(), MultiView(HIDDEN, samples(), SMALL)
    train(first, part, range(2))
    again, rest = reward_model(), MultiView(HIDDEN, samples(), SMALL)
    again.load_state_dict(first.state_dict())
    rest.load_state_dict(part.state_dict())
    torch.manual_seed(5)
    train(again, rest, range(2, 4))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, rest.state_dict()[name]), name


def test_initial_weights_hang_on_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = MultiView(HIDDEN, samples(), SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = MultiView(HIDDEN, samples(), SMALL)
    three = MultiView(HIDDEN, samples(), MultiViewConfig(latent=4, width=16, seed=1))
    weight = one.encoder.mean[0].weight
    assert torch.equal(weight, two.encoder.mean[0].weight)
    assert not torch.equal(weight, three.encoder.mean[0].weight)
    before = torch.get_rng_state()
    one(reward_model_without_touching_the_state(), 0)
    assert torch.equal(torch.get_rng_state(), before)


def reward_model_without_touching_the_state() -> RewardModel:
    with torch.random.fork_rng():
        return reward_model()


def test_every_prompt_and_view_is_drawn_alike_and_none_twice_at_once() -> None:
    module = MultiView(HIDDEN, samples(5, 3), MultiViewConfig(prompts_per_batch=2, width=4))
    noise = torch.Generator().manual_seed(0)
    prompts: dict[str, int] = {}
    views: dict[tuple[str, str], int] = {}
    for _ in range(600):
        drawn = module.draw(noise)
        assert len({str(prompt) for prompt, *_ in drawn}) == 2
        for prompt, first, second in drawn:
            assert first != second
            prompts[str(prompt)] = prompts.get(str(prompt), 0) + 1
            if prompt == module.samples[0][0]:
                views[str(first), str(second)] = views.get((str(first), str(second)), 0) + 1
    assert len(prompts) == 5
    assert all(abs(count - 240) < 55 for count in prompts.values())
    assert len(views) == 6


def test_fewer_prompts_than_asked_are_all_drawn() -> None:
    module = MultiView(HIDDEN, samples(3), MultiViewConfig(prompts_per_batch=8, width=4, latent=2))
    assert len(module.draw(torch.Generator())) == 3


def test_prompts_without_two_different_completions_are_left_out_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows: list[tuple[Prompt, list[Completion]]] = [
        ("a", ["x", "y"]),
        ("b", ["x", "x"]),
        ("c", ["x"]),
        ("d", ["y"]),
        ([{"role": "user", "content": "e"}], ["x", "y", "x"]),
        ("d", ["z", "y"]),  # joined with the "d" above
    ]
    with caplog.at_level(logging.WARNING):
        module = MultiView(HIDDEN, rows, SMALL)
    assert module.excluded == 2
    assert "2 of 5 prompts have fewer than two different completions" in caplog.text
    assert [completions for _, completions in module.samples] == [
        ["x", "y"],
        ["y", "z"],
        ["x", "y"],
    ]
    with pytest.raises(ValueError, match=r"at least 2 prompts .* got 1 \(2 left out\)"):
        MultiView(HIDDEN, rows[:3], SMALL)


def test_messages_are_views_too() -> None:
    rows: list[tuple[Prompt, list[Completion]]] = [
        (
            [{"role": "user", "content": text}],
            [[{"role": "assistant", "content": answer}] for answer in ("yes", "no", "yes")],
        )
        for text in ("one?", "two?")
    ]
    module = MultiView(HIDDEN, rows, SMALL)
    assert [len(completions) for _, completions in module.samples] == [2, 2]
    loss, _ = module(reward_model(), 0)
    assert loss.isfinite()


def test_a_prompt_cut_for_the_longer_view_fits_both() -> None:
    model = reward_model(max_length=40)
    long = " ".join(["cat"] * 30)
    rows: list[tuple[Prompt, list[Completion]]] = [
        (f"{i} {long}", ["a cat", " ".join(["dog"] * 8)]) for i in "ab"
    ]
    seen: list[int] = []

    def look(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        if "position_ids" in kwargs:  # a packed row
            seen.append(int(kwargs["position_ids"].max()))

    model.backbone.register_forward_pre_hook(look, with_kwargs=True)
    module = MultiView(HIDDEN, rows, SMALL)
    assert module(model, 0)[0].isfinite()
    assert seen[-1] == 39  # forty tokens at most, and the longer view has them all


def test_a_completion_that_does_not_fit_is_named() -> None:
    rows: list[tuple[Prompt, list[Completion]]] = [
        (name, [" ".join(["dog"] * 30), " ".join(["cat"] * 30)]) for name in "ab"
    ]
    with pytest.raises(DataError, match="policy sample for multi-view learning: a completion of"):
        MultiView(HIDDEN, rows, SMALL)(reward_model(max_length=10), 0)


def test_encoder_and_losses_stay_in_float32_under_autocast() -> None:
    model, module = reward_model(), MultiView(HIDDEN, samples(), SMALL)
    dtypes = []
    module.encoder.register_forward_hook(lambda m, a, out: dtypes.extend(o.dtype for o in out))
    module.critic.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = module(model, 0)
    assert loss.dtype == torch.float32
    assert set(dtypes) == {torch.float32}
    loss.backward()


def test_a_reward_model_without_a_head_of_ours_is_refused() -> None:
    model = reward_model()
    require_one_state(model)
    model.head = None
    for ask in (require_one_state, lambda m: MultiView(HIDDEN, samples(), SMALL)(m, 0)):
        with pytest.raises(ValueError, match=r"make one with RewardModel\.from_backbone"):
            ask(model)


@pytest.mark.parametrize("members", [1, 2])
def test_a_lora_ensemble_is_refused_before_it_has_learnt_anything(members: int) -> None:
    model = reward_model(lora_members=members, lora_rank=2)
    with pytest.raises(ValueError, match=f"each of the {members} members has its own"):
        require_one_state(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="one last state of each completion"):
        trained(model, MultiView(HIDDEN, samples(), SMALL))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_adapters_and_gaussian_heads_have_one_state() -> None:
    for options in ({"lora_rank": 2}, {"members": 3}):
        model = reward_model(**options)
        require_one_state(model)
        assert MultiView(HIDDEN, samples(), SMALL)(model, 0)[0].isfinite()


# --- views of one cluster ------------------------------------------------------------------------


CLUSTER = replace(SMALL, views="cluster", prompts_per_batch=2)


def same_letter(
    prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
) -> list[bool]:
    return [first[0] == second[0] for first, second in zip(firsts, seconds, strict=True)]


def test_distinct_views_are_drawn_from_all_of_a_prompts_completions() -> None:
    module = MultiView(HIDDEN, samples(5, 4), SMALL)
    order = torch.randperm(5, generator=(noise := torch.Generator().manual_seed(7)))[:4]
    expected = []
    for i in order.tolist():
        prompt, completions = module.samples[i]
        one, two = torch.randperm(4, generator=noise)[:2].tolist()
        expected.append((prompt, completions[one], completions[two]))
    assert module.draw(torch.Generator().manual_seed(7)) == expected


def test_views_of_a_cluster_say_the_same_and_larger_clusters_come_more_often() -> None:
    rows: list[tuple[Prompt, list[Completion]]] = [
        ("p", ["a1", "b1", "a2", "c1", "b2", "a3"]),
        ("q", ["x1", "x2", "y1"]),
    ]
    module = MultiView(HIDDEN, rows, CLUSTER, equivalent=same_letter)
    assert module.clusters == [[[0, 2, 5], [1, 4]], [[0, 1]]]
    noise = torch.Generator().manual_seed(0)
    views = Counter(drawn for _ in range(1500) for drawn in module.draw(noise))
    of_p = {drawn[1:]: count for drawn, count in views.items() if drawn[0] == "p"}
    assert sum(of_p.values()) == 1500
    # The cluster of three has six ordered pairs and 3/5 of the draws, that of two has two and 2/5.
    assert set(of_p) == {
        *((a, b) for a in ("a1", "a2", "a3") for b in ("a1", "a2", "a3") if a != b),
        ("b1", "b2"),
        ("b2", "b1"),
    }
    for (first, _), count in of_p.items():
        expected = 150 if first[0] == "a" else 300
        assert abs(count - expected) < 4.5 * math.sqrt(expected), (first, count)
    assert {drawn[1:] for drawn in views if drawn[0] == "q"} == {("x1", "x2"), ("x2", "x1")}


def test_prompts_without_a_cluster_of_two_are_left_out_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows: list[tuple[Prompt, list[Completion]]] = [
        ("a", ["x1", "x2", "y"]),
        ("b", ["x", "y", "z"]),
        ("c", ["x", "x"]),  # twice the same says nothing of sameness
        ("d", ["x1", "y1", "y2"]),
        ("e", ["x", "y", "y"]),
    ]
    with caplog.at_level(logging.WARNING):
        module = MultiView(HIDDEN, rows, CLUSTER, equivalent=same_letter)
    assert (module.excluded, module.unclustered) == (1, 2)
    assert [prompt for prompt, _ in module.samples] == ["a", "d"]
    assert module.clusters == [[[0, 1]], [[1, 2]]]
    assert "1 of 5 prompts have fewer than two different completions" in caplog.text
    assert "2 of 5 prompts have no two different completions that say the same" in caplog.text
    with pytest.raises(ValueError, match=r"of one cluster each, got 1 \(2 left out\)"):
        MultiView(HIDDEN, rows[:3], CLUSTER, equivalent=same_letter)


def test_messages_are_clustered_by_their_text_under_their_own_prompt() -> None:
    asked: list[tuple[Prompt, str, str]] = []

    def exact(
        prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[bool]:
        asked.extend(zip(prompts, firsts, seconds, strict=True))
        return exact_match(prompts, firsts, seconds)

    rows: list[tuple[Prompt, list[Completion]]] = [
        (
            [{"role": "user", "content": text}],
            [[{"role": "assistant", "content": answer}] for answer in ("Yes.", "no", "yes")],
        )
        for text in ("one?", "two?")
    ]
    module = MultiView(HIDDEN, rows, CLUSTER, equivalent=exact)
    assert module.clusters == [[[0, 2]], [[0, 2]]]
    assert ([{"role": "user", "content": "two?"}], "Yes.", "yes") in asked
    assert module(reward_model(), 0)[0].isfinite()


def test_where_all_say_the_same_clusters_are_drawn_as_distinct_views() -> None:
    def always(prompts: object, firsts: Sequence[str], seconds: object) -> list[bool]:
        return [True] * len(firsts)

    model = reward_model()
    clustered = MultiView(HIDDEN, samples(), replace(SMALL, views="cluster"), equivalent=always)
    assert clustered(model, 3)[0].item() == MultiView(HIDDEN, samples(), SMALL)(model, 3)[0].item()


def test_clusters_need_an_equivalence_and_an_equivalence_needs_clusters() -> None:
    with pytest.raises(ValueError, match="needs an equivalence: pass `equivalent`"):
        MultiView(HIDDEN, samples(), CLUSTER)
    with pytest.raises(ValueError, match="would do nothing with views='distinct'"):
        MultiView(HIDDEN, samples(), SMALL, equivalent=exact_match)


# --- beside the training of a reward model --------------------------------------------------------


def trained(
    model: RewardModel, multi_view: MultiView | None, *, folder: Path | None = None
) -> RewardModel:
    rows = [PreferenceRow(*row) for row in tiny_preferences(24)]
    config = RewardConfig(learning_rate=1e-3, batch_size=8, epochs=1.0, progress=False)
    return train_reward(model, rows, config, output_dir=folder, auxiliary=multi_view)


def module_for(loss: LossName, weight: float = 0.5) -> MultiView:
    texts: list[tuple[Prompt, list[Completion]]] = [
        (prompt, [chosen, rejected]) for prompt, chosen, rejected in tiny_preferences(6, seed=3)
    ]
    config = MultiViewConfig(loss=loss, weight=weight, latent=4, width=8, prompts_per_batch=3)
    return MultiView(HIDDEN, texts, config)


def test_with_weight_zero_the_reward_model_is_the_one_of_plain_training() -> None:
    def weights(multi_view: MultiView | None) -> list[Tensor]:
        return [p.detach() for p in trained(reward_model(), multi_view).parameters()]

    plain = weights(None)
    for loss in ALL:
        without, with_it = weights(module_for(loss, weight=0.0)), weights(module_for(loss))
        assert all(torch.equal(a, b) for a, b in zip(plain, without, strict=True)), loss
        assert not all(torch.equal(a, b) for a, b in zip(plain, with_it, strict=True)), loss


@pytest.mark.parametrize("loss", ["uml", "contrastive"])
def test_what_was_trained_beside_the_model_is_not_saved_with_it(
    loss: LossName, tmp_path: Path
) -> None:
    def keys(folder: Path) -> set[str]:
        with safe_open(folder / "model" / "model.safetensors", framework="pt") as tensors:
            return set(tensors.keys())

    trained(reward_model(), None, folder=tmp_path / "plain")
    module = module_for(loss)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    trained(reward_model(), module, folder=tmp_path / "multi_view")
    assert any(not torch.equal(w, before[name]) for name, w in module.state_dict().items())
    assert keys(tmp_path / "multi_view") == keys(tmp_path / "plain")
    assert not [k for k in keys(tmp_path / "multi_view") if k.startswith(tuple(module._modules))]
    again = RewardModel.from_pretrained(tmp_path / "multi_view" / "model")
    assert {name.split(".")[0] for name, _ in again.named_parameters()} == {"backbone", "head"}
