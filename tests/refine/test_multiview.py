import logging
import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from trueward.data.formats import Completion, DataError, Prompt
from trueward.losses.information import gaussian_symmetric_kl, jensen_shannon_mi
from trueward.models.backbone import make_batch
from trueward.models.reward_model import RewardModel
from trueward.refine.multiview import (
    Critic,
    GaussianEncoder,
    MultiView,
    MultiViewConfig,
    multi_view_loss,
)
from trueward.testing import tiny_backbone, tiny_texts, tiny_tokenizer

HIDDEN = 32
SMALL = MultiViewConfig(latent=4, width=16, prompts_per_batch=4)


def reward_model(**options: int) -> RewardModel:
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

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

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
    terms = multi_view_loss(*gaussians(4), Product(), skl_coef=0.0)
    torch.testing.assert_close(terms.loss, -terms.mutual_information)


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


def test_defaults_are_those_of_the_specification() -> None:
    config = MultiViewConfig()
    assert (config.weight, config.skl_coef, config.latent, config.width) == (0.5, 1.0, 64, 1024)
    module = MultiView(HIDDEN, samples(), config)
    widths = [m.weight.shape for m in module.critic.score if isinstance(m, nn.Linear)]
    assert widths == [(1024, 128), (1024, 1024), (1, 1024)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("latent", 0), ("width", 0), ("weight", -1.0), ("skl_coef", math.inf), ("weight", math.nan)],
)
def test_wrong_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        MultiViewConfig(**{name: value})  # type: ignore[arg-type]


# --- MultiView -----------------------------------------------------------------------------------


def test_the_gradient_reaches_backbone_encoder_and_critic_but_not_the_reward_head() -> None:
    model = reward_model()
    module = MultiView(HIDDEN, samples(), SMALL)
    loss, _ = module(model, 0)
    loss.backward()
    assert model.backbone.embed_tokens.weight.grad.abs().max() > 0
    for layer in model.backbone.layers:
        assert layer.self_attn.v_proj.weight.grad.abs().max() > 0
    for parameter in module.parameters():
        assert parameter.grad is not None
    assert model.head is not None
    assert model.head.linear.weight.grad is None


def expected_terms(
    module: MultiView, model: RewardModel, step: int
) -> tuple[Float[Tensor, " batch"], list[str]]:
    """The loss once more, each completion in a row of its own and no code of `forward`."""
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
    mean, std = module.encoder(torch.cat(states))
    z = mean + std * torch.randn(mean.shape, generator=noise)
    first, second = slice(0, None, 2), slice(1, None, 2)
    joint = module.critic(z[first], z[second])
    product = module.critic(torch.cat([z[first][-1:], z[first][:-1]]), z[second])
    information = -nn.functional.softplus(-joint) - nn.functional.softplus(product)
    kl = gaussian_symmetric_kl(mean[first], std[first], mean[second], std[second])
    return torch.stack([information.mean(), kl.mean()]), [str(prompt) for prompt, *_ in drawn]


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
    assert all(type(value) is float for value in metrics.values())


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
    model.head = None
    with pytest.raises(ValueError, match=r"make one with RewardModel\.from_backbone"):
        MultiView(HIDDEN, samples(), SMALL)(model, 0)


def test_with_weight_zero_the_reward_model_is_the_one_of_plain_training():
    from trueward.data.formats import PreferenceRow
    from trueward.testing import tiny_preferences
    from trueward.train.reward import RewardConfig, train_reward

    tokenizer = tiny_tokenizer()
    rows = [PreferenceRow(*row) for row in tiny_preferences(24)]
    samples = [(p, [c, r]) for p, c, r in tiny_preferences(6, seed=3)]

    def trained(multi_view: MultiView | None) -> list[torch.Tensor]:
        backbone = tiny_backbone(vocab_size=len(tokenizer))
        model = RewardModel.from_backbone(backbone, tokenizer)
        config = RewardConfig(learning_rate=1e-3, batch_size=8, epochs=1.0, progress=False)
        train_reward(model, rows, config, auxiliary=multi_view)
        return [p.detach() for p in model.parameters()]

    plain = trained(None)
    settings = {"latent": 4, "width": 8, "prompts_per_batch": 3}
    without = trained(MultiView(32, samples, MultiViewConfig(weight=0.0, **settings)))
    with_it = trained(MultiView(32, samples, MultiViewConfig(weight=0.5, **settings)))
    assert all(torch.equal(a, b) for a, b in zip(plain, without, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, with_it, strict=True))
