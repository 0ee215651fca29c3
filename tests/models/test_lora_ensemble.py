"""Members of one base in one pass against the same members computed one by one."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from trueward.data.formats import DataError, PreferenceRow
from trueward.data.packing import Group, PackedBatch, pack, pad
from trueward.losses import bradley_terry_loss, nuclear_norm_diversity
from trueward.models import lora_ensemble
from trueward.models.backbone import add_adapters, can_share_prefixes, hidden_states
from trueward.models.heads import GaussianHeads, ScalarHead
from trueward.models.lora_ensemble import (
    AdapterDiversity,
    LoRAEnsemble,
    MemberHeads,
    layer_count,
)
from trueward.models.reward_model import RewardModel, merged
from trueward.models.weight_averaging import average_weights
from trueward.posterior import RewardPosterior
from trueward.testing import random_groups, tiny_backbone, tiny_preferences, tiny_texts
from trueward.train.reward import RewardConfig, own_completions, pair_losses, train_reward

DECODERS = ["llama", "qwen2", "gpt2", "opt", "gpt_neox"]
GROUPS = [
    Group(prompt, completions)
    for prompt, completions in random_groups(
        320, prompts=[7, 1, 12], completions=[[5, 1, 9], [4], [3, 8]]
    )
]
TEXTS = tiny_texts(6, seed=3)
PROMPTS = [TEXTS[0]] * 3 + [TEXTS[1]] + [TEXTS[0]] + [TEXTS[2]]
COMPLETIONS = [*tiny_texts(5, seed=4), "."]


def made(
    tokenizer: PreTrainedTokenizerFast,
    model_type: str = "llama",
    *,
    share: float = 1.0,
    members: int = 3,
    rank: int = 2,
    seed: int = 0,
    **config: object,
) -> RewardModel:
    """An ensemble whose members differ, in B too, as after training."""
    model = RewardModel.from_backbone(
        tiny_backbone(model_type, **config),
        tokenizer,
        lora_members=members,
        lora_rank=rank,
        lora_layers=share,
        seed=seed,
    ).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for adapter in model.lora.adapters.values():
        adapter.b.data = 0.2 * torch.randn(adapter.b.shape, generator=generator)
    return model


def linear_layers(model: RewardModel) -> dict[str, nn.Module]:
    """The adapted layers of the base by their whole names, found apart from the code under test."""
    found = {}
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            keys = [k for k in model.lora.adapters if name.replace(".", "/").endswith("/" + k)]
            assert len(keys) <= 1
            if keys:
                found[name] = model.lora.adapters[keys[0]]
    return found


def one_by_one(model: RewardModel, batch: PackedBatch) -> Tensor:
    """Rewards `[completion, member]` by `W0 + 2 B_n A_n` written into the base, as peft merges."""
    base = dict(model.backbone.named_parameters())
    columns = []
    for n in range(model.members):
        weights = {}
        for name, adapter in linear_layers(model).items():
            added = 2.0 * adapter.b[n] @ adapter.a[n]  # alpha = 2 * rank
            weight = base[f"{name}.weight"]
            transposed = isinstance(model.backbone.get_submodule(name), Conv1D)
            weights[f"{name}.weight"] = weight + (added.T if transposed else added)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.packed:
            inputs["position_ids"] = batch.position_ids
        inputs["use_cache"] = False
        states = functional_call(model.backbone, weights, kwargs=inputs).last_hidden_state
        columns.append(states[batch.rows, batch.last] @ model.head.weight[n])
    return torch.stack(columns, dim=1)


@pytest.fixture(params=[1, 100_000], ids=["row by row", "all rows at once"])
def cpu_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(lora_ensemble, "CPU_TOKENS", request.param)
    return request.param


# ---- the batched pass ----------------------------------------------------------------------


@pytest.mark.parametrize("form", [pack, pad])
@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.usefixtures("cpu_tokens")
def test_one_pass_for_all_members_equals_a_pass_for_each(
    tokenizer: PreTrainedTokenizerFast, model_type: str, share: float, form
) -> None:
    model = made(tokenizer, model_type, share=share)
    batch = form(GROUPS, pad_id=0)
    parameters = dict(model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    weights = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for rewards in (model(batch).means, one_by_one(model, batch)):
        results.append((rewards, torch.autograd.grad((rewards * weights).sum(), trained)))
    (ours, our_gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert ours.std(dim=1).min() > 1e-2  # members differ
    assert len(trained) == 2 * len(linear_layers(model)) + 1
    for gradient, reference in zip(our_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, atol=2e-5, rtol=1e-4)
        assert gradient.abs().max() > 1e-6
    with torch.no_grad():  # adds in place
        torch.testing.assert_close(model(batch).means, expected, atol=1e-5, rtol=1e-5)


def test_one_row_and_one_member_are_no_special_cases(tokenizer: PreTrainedTokenizerFast) -> None:
    for members in (1, 3):
        model = made(tokenizer, members=members, share=0.5)
        batch = pack(GROUPS[:1], pad_id=0)
        torch.testing.assert_close(
            model(batch).means, one_by_one(model, batch), atol=1e-5, rtol=1e-5
        )


def test_an_encoder_whose_layers_are_adapted_scores_right(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = made(tokenizer, "bert")
    assert not model.shares_prefixes
    batch = pad(GROUPS, pad_id=0)
    torch.testing.assert_close(model(batch).means, one_by_one(model, batch), atol=1e-5, rtol=1e-5)


def test_an_adapter_agrees_with_peft(tokenizer: PreTrainedTokenizerFast) -> None:
    model = made(tokenizer, members=2)
    theirs = add_adapters(copy.deepcopy(model.backbone), rank=2)
    for name, adapter in linear_layers(model).items():
        layer = theirs.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data = adapter.a[1].data
        layer.lora_B["default"].weight.data = adapter.b[1].data
    batch = pack(GROUPS, pad_id=0)
    states = hidden_states(theirs, batch)[batch.rows, batch.last]
    torch.testing.assert_close(model.hidden(batch)[:, 1], states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_trunk_is_computed_once_and_the_first_inputs_too(
    tokenizer: PreTrainedTokenizerFast, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_ensemble, "CPU_TOKENS", 100_000)
    model = made(tokenizer, model_type, share=0.5, members=5, layers=4)
    layers = getattr(model.backbone, "layers", None) or model.backbone.h
    seen: list[tuple[str, int]] = []

    def watch(name: str, module: nn.Module) -> None:
        def note(module: nn.Module, args: tuple, output: Tensor) -> None:
            seen.append((name, args[0].shape[0]))

        module.register_forward_hook(note)

    for i, layer in enumerate(layers):
        watch(f"layer {i}", layer)
    first, last = layers[2], layers[3]
    if model_type == "llama":
        reads = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 5}
        where = [x.self_attn for x in (first, last)]
    else:
        reads = {"c_attn": 1, "c_proj": 5}
        where = [x.attn for x in (first, last)]
    for name in reads:
        watch(f"first {name}", getattr(where[0], name))
        watch(f"last {name}", getattr(where[1], name))
    model(pack(GROUPS, pad_id=0))
    rows = len(GROUPS)
    expected = {f"layer {i}": rows * (1 if i < 2 else 5) for i in range(4)}
    expected |= {f"first {name}": rows * times for name, times in reads.items()}
    expected |= {f"last {name}": rows * 5 for name in reads}
    assert len(seen) == len(expected)  # each once
    assert dict(seen) == expected


def test_on_a_cpu_a_part_of_the_batch_holds_a_bounded_number_of_tokens(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(tokenizer)
    batch = pad(GROUPS, pad_id=0)
    rows, seq = batch.input_ids.shape
    monkeypatch.setattr(lora_ensemble, "CPU_TOKENS", 2 * 3 * seq)  # two rows of three members
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    parts = list(model.lora.parts(batch))
    assert [len(p.input_ids) for p in parts] == [2] * (rows // 2)
    assert sum(map(len, parts)) == len(batch)
    again = [p.input_ids[p.rows, p.last] for p in parts]
    assert torch.equal(torch.cat(again), batch.input_ids[batch.rows, batch.last])


class Flat(nn.Module):
    """A linear layer that reads its tokens without their rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_inputs_are_taken_for_common_at_the_first_linear_layer_only(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = made(tokenizer)
    batch = pack(GROUPS, pad_id=0)
    expected = model(batch).means
    attention = model.backbone.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        flat = Flat(getattr(attention, name))
        setattr(attention, name, flat)
        key = f"0/self_attn/{name}"
        model.lora.adapters[f"{key}/inner"] = model.lora.adapters.pop(key)
    torch.testing.assert_close(model(batch).means, expected, atol=1e-5, rtol=1e-5)


def test_the_base_is_as_it_was_after_a_forward_also_one_that_fails(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = made(tokenizer)
    batch = pack(GROUPS, pad_id=0)
    plain = hidden_states(tiny_backbone(), batch)
    model(batch)
    assert torch.equal(hidden_states(model.backbone, batch), plain)
    handle = model.backbone.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch)
    handle.remove()
    assert torch.equal(hidden_states(model.backbone, batch), plain)
    assert can_share_prefixes(model.backbone)
    assert merged(model.backbone) is model.backbone


def test_a_copy_of_the_model_has_adapters_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    model = made(tokenizer)
    batch = pack(GROUPS, pad_id=0)
    expected = model(batch).means.detach()
    other = copy.deepcopy(model)
    for adapter in other.lora.adapters.values():
        adapter.b.data.zero_()
    assert torch.equal(model(batch).means, expected)
    assert not torch.allclose(other(batch).means, expected, atol=1e-3)


# ---- what is trained -----------------------------------------------------------------------


def test_one_members_loss_touches_no_other_members_adapters(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = made(tokenizer)
    model(pack(GROUPS, pad_id=0)).means[:, 1].square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    own = [model.head.weight.grad]
    own += [p.grad for a in model.lora.adapters.values() for p in (a.a, a.b)]
    for gradient in own:
        assert gradient[1].abs().max() > 1e-6
        assert gradient[[0, 2]].abs().max() == 0


def test_members_start_as_the_base_with_adapters_and_heads_of_their_own(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    def fresh(seed: int) -> RewardModel:
        return RewardModel.from_backbone(
            tiny_backbone(), tokenizer, lora_members=3, lora_rank=4, seed=seed
        )

    model, batch = fresh(0), pack(GROUPS, pad_id=0)
    states = hidden_states(model.backbone, batch)[batch.rows, batch.last]
    hidden = model.hidden(batch)
    assert hidden.shape == (6, 3, 32)
    torch.testing.assert_close(hidden, states[:, None].expand(6, 3, 32), atol=1e-5, rtol=1e-5)
    for adapter in model.lora.adapters.values():
        bound = 1 / math.sqrt(adapter.a.shape[2])
        assert 0.9 * bound < adapter.a.abs().max() <= bound
        assert adapter.a.mean().abs() < 0.1 * bound
        assert not torch.equal(adapter.a[0], adapter.a[1])
        assert not adapter.b.any()
    assert torch.corrcoef(model.head.weight).fill_diagonal_(0).abs().max() < 0.5
    assert not torch.equal(*[next(iter(m.lora.adapters.values())).a for m in (model, fresh(1))])
    torch.manual_seed(99)  # only the seed counts
    for (name, one), two in zip(model.named_parameters(), fresh(0).parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_share_of_the_layers_from_the_top_is_adapted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for share, total, count in [
        (0.25, 8, 2),
        (0.25, 7, 2),
        (0.25, 2, 1),
        (1.0, 6, 6),
        (0.01, 30, 1),
        (3, 4, 3),
    ]:
        assert layer_count(float(share), total) == count
    model = made(tokenizer, share=0.5, layers=4)
    assert {key.split("/")[0] for key in model.lora.adapters} == {"2", "3"}
    assert len(model.lora.adapters) == 2 * 7
    assert model.lora.describe() == {"members": 3, "rank": 2, "layers": 2, "alpha": 4}


@pytest.mark.parametrize("share", [0.0, -0.5, 2.5, 5.0])
def test_a_share_of_no_layers_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"a share in \(0, 1\] or a whole number"):
        layer_count(share, 4)


def test_member_heads_read_each_its_own_state() -> None:
    heads = MemberHeads(2, 3)
    heads.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    hidden = torch.tensor([[[3.0, 9.0], [9.0, 4.0], [5.0, 7.0]]])
    means, stds = heads(hidden)
    assert means.tolist() == [[3.0, 4.0, -2.0]]
    assert stds is None
    torch.manual_seed(0)
    assert MemberHeads(255, 40).weight.std().item() == pytest.approx(1 / 16, rel=0.05)


# ---- dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_bf16_base_stays_so_and_adapters_and_rewards_are_float32(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    model = made(tokenizer, model_type)
    batch = pack(GROUPS, pad_id=0)
    expected = model(batch).means.detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(batch).means, expected, atol=0.1, rtol=0.05)
    model.backbone.bfloat16()
    batch = batch.to("cpu", torch.bfloat16)
    rewards = model(batch).means
    torch.testing.assert_close(rewards, expected, atol=0.1, rtol=0.05)
    assert rewards.dtype == torch.float32
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.lora.parameters()} == {torch.float32}
    rewards.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.lora.parameters())


# ---- scoring, saving, loading --------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.usefixtures("cpu_tokens")
def test_a_score_does_not_depend_on_its_batch(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    model = made(tokenizer, model_type, share=0.5)
    expected = model.score(PROMPTS, COMPLETIONS).means
    assert expected.shape == (6, 3)
    assert expected.std(0).min() > 0.05  # the rows differ at all
    for options in (
        {"batch_size": 1},
        {"max_tokens": 1},
        {"max_tokens": 60},
        {"shared_prefix": False},
        {"shared_prefix": False, "batch_size": 4},
    ):
        again = model.score(PROMPTS, COMPLETIONS, **options).means
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5, msg=str(options))
    alone = model.score(PROMPTS[3:4], COMPLETIONS[3:4]).means
    torch.testing.assert_close(alone, expected[3:4], atol=1e-5, rtol=1e-5)


def test_the_token_budget_is_that_of_all_members_together(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = made(tokenizer, members=5)
    assert model.copies == 5
    prompts, completions = tiny_texts(40), tiny_texts(40, seed=1)
    model.score(prompts[:1], completions[:1])  # the check of the base is not counted
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].input_ids.numel()))
    model.score(prompts, completions, max_tokens=1000)
    assert sum(seen) > 400
    assert 120 < max(seen) <= 200


IN_ANOTHER_PROCESS = """
import json, sys
import torch
from safetensors.torch import save_file
from trueward import RewardModel

torch.set_num_threads(1)
folder, texts = sys.argv[1], json.loads(sys.argv[2])
found = {}
for name in ("top", "all"):
    model = RewardModel.from_pretrained(f"{folder}/{name}", device="cpu")
    assert not model.training
    found[name] = model.score(*texts).means
save_file(found, f"{folder}/scores.safetensors")
"""


def test_a_saved_ensemble_gives_the_same_posterior_in_another_process(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    models = {
        "top": made(tokenizer, share=0.25, members=5),
        "all": made(tokenizer, "gpt2", share=1.0, rank=3),
    }
    for name, model in models.items():
        model.set_normalisation(PROMPTS, COMPLETIONS)
        model.save_pretrained(tmp_path / name)
    job = json.dumps([PROMPTS, COMPLETIONS])
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path), job],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "scores.safetensors")
    for name, model in models.items():
        assert torch.equal(theirs[name], model.score(PROMPTS, COMPLETIONS).means), name
        weights = load_file(tmp_path / name / "model.safetensors")
        base = {k for k in weights if not k.startswith(("head.", "lora."))}
        assert base == set(model.backbone.state_dict())
        assert {k.removeprefix("lora.") for k in weights if k.startswith("lora.")} == set(
            model.lora.state_dict()
        )
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["trueward"]["lora"] == model.lora.describe()
        assert config["trueward"]["head"] == {"kind": "member", "members": model.members}
    again = RewardModel.from_pretrained(tmp_path / "top", dtype=torch.bfloat16)
    assert again.backbone.dtype == torch.bfloat16
    assert {p.dtype for p in [*again.lora.parameters(), *again.head.parameters()]} == {
        torch.float32
    }
    assert not any(p.requires_grad for p in again.backbone.parameters())


def test_a_folder_that_lacks_an_adapter_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made(tokenizer).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lora.adapters.1/mlp/up_proj.b"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks the weights lora\.adapters\.1/mlp/up_proj\.b: "):
        RewardModel.from_pretrained(tmp_path)


# ---- training ------------------------------------------------------------------------------

ROWS = [PreferenceRow(*row, where=f"made:{i}") for i, row in enumerate(tiny_preferences(32))]


def fresh(tokenizer: PreTrainedTokenizerFast, members: int = 3) -> RewardModel:
    return RewardModel.from_backbone(
        tiny_backbone(vocab_size=len(tokenizer)),
        tokenizer,
        lora_members=members,
        lora_rank=2,
        lora_layers=0.5,
    )


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("member_loss", ["each", "mean"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, member_loss: str
) -> None:
    model = fresh(tokenizer)
    before = copy.deepcopy(model)
    config = RewardConfig(
        learning_rate=1e-2,
        batch_size=16,
        epochs=6.0,
        max_batch_tokens=1800,
        member_loss=member_loss,
        progress=False,
    )
    train_reward(model, ROWS, config, output_dir=tmp_path)
    losses = [line["loss"] for line in metrics_of(tmp_path)]
    assert losses[0] > 0.65
    assert sum(losses[-4:]) / 4 < 0.45
    for name, weight in model.backbone.state_dict().items():
        assert torch.equal(weight, before.backbone.state_dict()[name]), name
    for name, weight in model.lora.state_dict().items():
        assert not torch.equal(weight, before.lora.state_dict()[name]), name
    margins = model.score(*own_completions(ROWS)).means
    margins = margins[0::2] - margins[1::2]
    assert ((margins > 0).float().mean(0) > 0.8).all()  # of every member
    again = RewardModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.lora.state_dict()[name], weight)


def test_members_that_learn_by_their_mean_all_see_every_pair(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    weights = {}
    for member_loss in ("each", "mean"):
        for subset in (0.5, 1.0):
            config = RewardConfig(
                learning_rate=1e-2,
                warmup_ratio=0.0,
                member_loss=member_loss,
                subset=subset,
                progress=False,
            )
            model = train_reward(fresh(tokenizer), ROWS[:8], config)
            weights[member_loss, subset] = model.head.weight
    assert torch.equal(weights["mean", 0.5], weights["mean", 1.0])
    assert not torch.equal(weights["each", 0.5], weights["each", 1.0])


def test_the_diversity_term_keeps_adapters_further_apart(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ends = {}
    for coef in (0.0, 1.0):
        model = fresh(tokenizer)
        config = RewardConfig(learning_rate=1e-2, batch_size=16, epochs=4.0, progress=False)
        train_reward(
            model,
            ROWS,
            config,
            output_dir=tmp_path / str(coef),
            auxiliary=AdapterDiversity(coef=coef),
        )
        logged = metrics_of(tmp_path / str(coef))
        ends[coef] = logged[-1]["diversity"]
        direct = [nuclear_norm_diversity(a.flatten(0, 1)) for a in _all_a(model)]
        # Logged before the last step.
        assert torch.stack(direct).mean().item() == pytest.approx(ends[coef], abs=0.02)
    assert 1 < ends[0.0] < ends[1.0] - 0.01
    assert ends[1.0] <= math.sqrt(6)


def _all_a(model: RewardModel) -> list[Tensor]:
    return [p.detach() for n, p in model.lora.named_parameters() if n.endswith(".a")]


def test_the_diversity_term_is_the_mean_over_layers_of_a_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = made(tokenizer, share=0.5)
    loss, metrics = AdapterDiversity(coef=0.3)(model, 1)
    expected = [a.flatten(0, 1).svd().S.sum() / a.square().sum().sqrt() for a in _all_a(model)]
    assert len(expected) == 7
    value = torch.stack(expected).mean().item()
    assert metrics == {"diversity": pytest.approx(value, rel=1e-5)}
    assert loss.item() == pytest.approx(-0.3 * value, rel=1e-5)
    loss.backward()
    moved = {n.rsplit(".")[-1] for n, p in model.named_parameters() if p.grad is not None}
    assert moved == {"a"}
    assert not list(AdapterDiversity().parameters())


def test_members_learn_each_alone_or_by_their_mean() -> None:
    means = torch.tensor([[2.0, -1.0], [0.0, 1.0], [0.5, 3.0], [1.0, 0.0]])  # chosen, rejected, ...
    margins = torch.tensor([0.5, 0.0])
    posterior = RewardPosterior(means)
    config = RewardConfig(centring=0.1)
    each = pair_losses(posterior, margins, config)
    gaps = torch.tensor([[1.5, -2.5], [-0.5, 3.0]])
    centring = 0.1 * torch.tensor([[4.0, 0.0], [2.25, 9.0]])
    torch.testing.assert_close(each, -gaps.sigmoid().log() + centring)
    together = pair_losses(posterior, margins, RewardConfig(centring=0.1, member_loss="mean"))
    mean_gaps = torch.tensor([[-0.5], [1.25]])  # 0.5 - 0.5 - 0.5 and 1.75 - 0.5
    torch.testing.assert_close(together, -mean_gaps.sigmoid().log() + centring)
    scalar = pair_losses(RewardPosterior(means[:, :1]), margins, config)
    torch.testing.assert_close(scalar, each[:, :1])
    smooth = RewardConfig(centring=0.0, label_smoothing=0.2)
    expected = bradley_terry_loss(
        means[0::2, 1], means[1::2, 1], margin=margins, label_smoothing=0.2
    )
    torch.testing.assert_close(pair_losses(posterior, margins, smooth)[:, 1], expected)


# ---- what is refused -----------------------------------------------------------------------


def test_options_that_do_not_go_together_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for options in (
        {"lora_members": 3},
        {"lora_members": 3, "lora_rank": 2, "members": 2},
        {"lora_members": -1, "lora_rank": 2},
    ):
        with pytest.raises(ValueError, match="lora_members needs lora_rank"):
            RewardModel.from_backbone(tiny_backbone(), tokenizer, **options)
    for head in (ScalarHead(32), GaussianHeads(32, 3), MemberHeads(32, 2)):
        lora = LoRAEnsemble(tiny_backbone(), members=3, rank=2, layers=1)
        with pytest.raises(ValueError, match="MemberHeads go together"):
            RewardModel(tiny_backbone(), head, tokenizer, lora=lora)
    with pytest.raises(ValueError, match="MemberHeads go together"):
        RewardModel(tiny_backbone(), MemberHeads(32, 2), tokenizer)
    with pytest.raises(ValueError, match="has its members' adapters"):
        made(tokenizer).add_lora(2)
    scalar = RewardModel.from_backbone(tiny_backbone(), tokenizer)
    with pytest.raises(ValueError, match="member_loss='mean' is for several members"):
        train_reward(scalar, ROWS, RewardConfig(member_loss="mean"))


def test_numbers_out_of_range_are_refused() -> None:
    for name in ("members", "rank"):
        numbers = {"members": 3, "rank": 2, "layers": 1} | {name: 0}
        with pytest.raises(ValueError, match=f"{name} of at least 1, got 0"):
            LoRAEnsemble(tiny_backbone(), **numbers)
    with pytest.raises(ValueError, match="between 1 and the backbone's 2, got 3"):
        LoRAEnsemble(tiny_backbone(), members=3, rank=2, layers=3)
    with pytest.raises(ValueError, match="at least one member"):
        MemberHeads(8, 0)
    with pytest.raises(ValueError, match="coef must be at least 0"):
        AdapterDiversity(coef=-0.1)


def test_a_base_that_cannot_be_told_apart_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="has adapters already"):
        LoRAEnsemble(add_adapters(tiny_backbone(), rank=2), members=2, rank=2, layers=1)

    class Half(nn.Module):
        """Reads every other token, as an expert reads some."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, ::2]).repeat_interleave(2, 1)[:, : x.shape[1]]

    backbone = tiny_backbone()
    backbone.layers[1].mlp = Half(backbone.layers[1].mlp)
    model = RewardModel.from_backbone(backbone, tokenizer, lora_members=2, lora_rank=2)
    with pytest.raises(ValueError, match="as experts do, so members cannot be told apart"):
        model(pad(GROUPS, pad_id=0))
    checkpointed = made(tokenizer).train()
    checkpointed.backbone.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="switch gradient checkpointing off"):
        checkpointed(pad(GROUPS, pad_id=0))


def test_diversity_without_an_ensemble_and_averages_of_ensembles_are_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    scalar = RewardModel.from_backbone(tiny_backbone(), tokenizer)
    with pytest.raises(ValueError, match="AdapterDiversity is for a LoRA ensemble"):
        AdapterDiversity()(scalar, 1)
    with pytest.raises(ValueError, match="low-rank ensemble has no mean of its factors"):
        average_weights([made(tokenizer), made(tokenizer)])
