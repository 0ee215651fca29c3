import math

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trueward.data import DataError
from trueward.data.packing import Group, pack, pad
from trueward.lab.grammar import GrammarWorld
from trueward.models.policy import (
    Policy,
    ValueModel,
    exact_token_kl,
    logit_scaling,
    token_logprobs,
)
from trueward.models.reward_model import RewardModel
from trueward.testing import random_groups, tiny_backbone, tiny_config, tiny_language_model

DECODERS = ["llama", "qwen2", "gpt2", "opt", "gpt_neox"]
GROUPS = [
    Group(prompt, completions)
    for prompt, completions in random_groups(
        320, prompts=[7, 1, 12], completions=[[5, 1, 9], [4], [3, 8]]
    )
]
PAIRS = [(list(g.prompt_ids), list(c)) for g in GROUPS for c in g.completions]


def policy_of(tokenizer: PreTrainedTokenizerFast, model_type: str = "llama", **options) -> Policy:
    return Policy(tiny_language_model(model_type, **options), tokenizer)


def perturb(policy: Policy, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def reference(
    model: torch.nn.Module, *, temperature: float = 1.0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities and entropies by hand, from the full logits of plain transformers."""
    results = []
    for prompt, completion in PAIRS:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        logprobs = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        chosen = logprobs[torch.arange(len(completion)), torch.tensor(completion)]
        results.append((chosen, -(logprobs.exp() * logprobs).sum(-1)))
    return results


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("form", [pack, pad])
def test_logprobs_and_entropies_equal_those_of_plain_transformers(
    tokenizer: PreTrainedTokenizerFast, model_type: str, form
) -> None:
    policy = policy_of(tokenizer, model_type)
    scores = policy(form(GROUPS, pad_id=0))
    assert scores.logprobs.shape == (6, 9)
    for i, (logprobs, entropies) in enumerate(reference(policy.model)):
        n = len(logprobs)
        torch.testing.assert_close(scores.logprobs[i, :n], logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores.entropies[i, :n], entropies, atol=1e-5, rtol=1e-5)
        assert (scores.logprobs[i, n:] == 0).all()
        assert (scores.entropies[i, n:] == 0).all()


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite", "opt", "gemma3_text"])
def test_models_that_scale_or_bound_their_logits_are_read_as_they_are(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    options = {
        "gemma2": {"head_dim": 8, "num_key_value_heads": 4, "final_logit_softcapping": 2.0},
        "gemma3_text": {"head_dim": 8, "num_key_value_heads": 4},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 4.0},
    }.get(model_type, {})
    policy = policy_of(tokenizer, model_type, **options)
    with torch.no_grad():  # larger logits, which the softcap bends
        policy.model.get_output_embeddings().weight.mul_(8)
    scores = policy(pad(GROUPS, pad_id=0))
    for i, (logprobs, _) in enumerate(reference(policy.model)):
        torch.testing.assert_close(
            scores.logprobs[i, : len(logprobs)], logprobs, atol=1e-5, rtol=1e-5
        )
    scale, softcap = logit_scaling(policy)
    assert softcap == (2.0 if model_type == "gemma2" else None)
    expected = {"cohere": 0.25, "granite": 0.25}.get(model_type, 1.0)
    assert scale == pytest.approx(expected, rel=1e-5)


def test_a_model_with_unknown_logits_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer)

    def shifted(module, args, output):
        output.logits = output.logits + torch.arange(320.0)
        return output

    policy.model.register_forward_hook(shifted)
    with pytest.raises(DataError, match="LlamaForCausalLM changes its logits in a way"):
        policy(pack(GROUPS, pad_id=0))


def test_temperature_divides_the_logits(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer)
    scores = policy(pack(GROUPS, pad_id=0), temperature=0.5)
    for i, (logprobs, entropies) in enumerate(reference(policy.model, temperature=0.5)):
        n = len(logprobs)
        torch.testing.assert_close(scores.logprobs[i, :n], logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores.entropies[i, :n], entropies, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", DECODERS)
def test_packed_gradients_equal_those_of_plain_transformers(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    policy = policy_of(tokenizer, model_type)
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        policy.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in policy.named_parameters()}

    rows = [weights[i, : len(r)] @ r for i, (r, _) in enumerate(reference(policy.model))]
    expected = gradients(sum(rows) / 30)
    for form in (pack, pad):
        scores = policy(form(GROUPS, pad_id=0))
        for name, gradient in gradients((scores.logprobs * weights).sum() / 30).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_entropies_carry_no_gradient(tokenizer: PreTrainedTokenizerFast) -> None:
    scores = policy_of(tokenizer)(pack(GROUPS, pad_id=0))
    assert scores.logprobs.requires_grad
    assert not scores.entropies.requires_grad


def test_token_logprobs_by_hand() -> None:
    head = torch.nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[0.0], [math.log(2.0)], [math.log(5.0)]])
    logprobs, entropies = token_logprobs(torch.ones(2, 1), head, torch.tensor([1, 2]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(2 / 8), math.log(5 / 8)]))
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    torch.testing.assert_close(entropies, torch.full((2,), entropy))


def test_sliced_token_logprobs_equal_whole_ones_with_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(11, 8, generator=generator)
    targets = torch.randint(0, 20, (11,), generator=generator)
    weights = torch.randn(11, generator=generator)
    head = torch.nn.Linear(8, 20)
    results = []
    for slice_tokens in (2048, 11, 4, 1):
        head.zero_grad()
        leaf = states.clone().requires_grad_()
        logprobs, entropies = token_logprobs(
            leaf, head, targets, temperature=0.7, slice_tokens=slice_tokens
        )
        (logprobs @ weights).backward()
        results.append((logprobs, entropies, leaf.grad, head.weight.grad.clone()))
    for result in results[1:]:
        for ours, whole in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-5)


def test_slices_are_computed_again_in_the_backward_pass() -> None:
    calls = []
    head = torch.nn.Linear(4, 8)
    head.register_forward_hook(lambda _, args, out: calls.append(tuple(out.shape)))
    states = torch.randn(6, 4, requires_grad=True)
    logprobs, _ = token_logprobs(states, head, torch.zeros(6, dtype=torch.long), slice_tokens=2)
    assert calls == [(2, 8)] * 3
    logprobs.sum().backward()
    assert calls == [(2, 8)] * 6  # not kept in between


def test_log_probabilities_are_float32_under_a_bf16_head() -> None:
    head = torch.nn.Linear(4, 512).bfloat16()
    states = torch.randn(3, 4).bfloat16()
    logprobs, entropies = token_logprobs(states, head, torch.zeros(3, dtype=torch.long))
    assert logprobs.dtype == entropies.dtype == torch.float32
    expected = head(states).float().log_softmax(-1)[:, 0]
    torch.testing.assert_close(logprobs, expected)
    assert not torch.equal(logprobs, logprobs.bfloat16().float())


def test_no_logits_are_made_beyond_the_completions_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    policy = policy_of(tokenizer)
    policy(pack(GROUPS, pad_id=0))  # the look at the logits' scale is not counted
    seen = []
    policy.model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    policy(pack(GROUPS, pad_id=0))
    policy(pad(GROUPS, pad_id=0))
    assert seen == [(30, 32), (30, 32)]  # 30 completion tokens; the padded batch has 6 x 20


@pytest.mark.parametrize("model_type", DECODERS)
def test_the_reference_is_the_policy_with_its_adapter_off(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    policy = policy_of(tokenizer, model_type)
    batch = pack(GROUPS, pad_id=0)
    expected = policy(batch).logprobs.detach()
    policy.add_lora(2)
    assert policy.has_adapter
    torch.testing.assert_close(policy(batch).logprobs, expected, atol=1e-5, rtol=1e-5)
    perturb(policy)
    trained = policy(batch).logprobs.detach()
    assert (trained - expected).abs().max() > 0.1
    with policy.adapter_off() as ref:
        assert ref is policy
        torch.testing.assert_close(ref(batch).logprobs, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(policy(batch).logprobs, trained)
    with pytest.raises(RuntimeError, match="stop"), policy.adapter_off():
        raise RuntimeError("stop")
    assert torch.equal(policy(batch).logprobs, trained)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == {
        n for n, _ in policy.named_parameters() if "lora_" in n
    }


def test_without_an_adapter_there_is_no_reference_inside(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    policy = policy_of(tokenizer)
    assert not policy.has_adapter
    with pytest.raises(ValueError, match="with an adapter"), policy.adapter_off():
        pass


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_frozen_copy_is_not_touched_by_training(
    tokenizer: PreTrainedTokenizerFast, lora_rank: int
) -> None:
    policy = policy_of(tokenizer)
    if lora_rank:
        policy.add_lora(lora_rank)
        perturb(policy)
    batch = pack(GROUPS, pad_id=0)
    ref = policy.frozen_copy()
    expected = ref(batch).logprobs
    torch.testing.assert_close(expected, policy(batch).logprobs.detach())
    assert not any(p.requires_grad for p in ref.parameters())
    assert not ref.training
    assert any(p.requires_grad for p in policy.parameters())
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    policy(batch).logprobs.sum().backward()
    optimizer.step()
    assert torch.equal(ref(batch).logprobs, expected)
    assert (policy(batch).logprobs - expected).abs().max() > 0.1


def test_training_mode_gives_the_same_logprobs(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer, "gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    batch = pack(GROUPS, pad_id=0)
    assert torch.equal(policy.train()(batch).logprobs, policy.eval()(batch).logprobs)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_saving_merges_the_adapter_and_leaves_the_policy(
    tokenizer: PreTrainedTokenizerFast, tmp_path, model_type: str
) -> None:
    policy = policy_of(tokenizer, model_type)
    policy.add_lora(2)
    perturb(policy)
    batch = pack(GROUPS, pad_id=0)
    expected = policy(batch).logprobs
    policy.save_pretrained(tmp_path)
    assert torch.equal(policy(batch).logprobs, expected)
    assert policy.has_adapter
    again = Policy.from_pretrained(tmp_path)
    torch.testing.assert_close(again(batch).logprobs, expected, atol=1e-4, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reference(plain)[0][0], expected[0, :5], atol=1e-4, rtol=1e-5)
    adapted = Policy.from_pretrained(tmp_path, lora_rank=2)
    assert adapted.has_adapter
    torch.testing.assert_close(adapted(batch).logprobs, again(batch).logprobs)


def test_a_folder_without_a_model_is_refused_in_one_sentence(tmp_path) -> None:
    with pytest.raises(DataError, match="No language model could be read from") as error:
        Policy.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_vocabulary_wider_than_the_tokenizer_keeps_its_normaliser(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_language_model(vocab_size=400)
    expected = reference(model)[0][0]
    tokenizer.pad_token = tokenizer.eos_token  # a pad token must be added: id 320
    policy = Policy(model, tokenizer)
    assert model.get_output_embeddings().weight.shape[0] == 400
    scores = policy(pack(GROUPS, pad_id=tokenizer.pad_token_id))
    torch.testing.assert_close(scores.logprobs[0, :5], expected, atol=1e-5, rtol=1e-5)


def test_the_limit_is_that_of_the_models_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    assert policy_of(tokenizer, max_positions=64).max_length == 64
    assert policy_of(tokenizer, "gpt2", max_positions=64).max_length == 64


# --- the critic ----------------------------------------------------------------------------------


def test_values_are_read_at_the_state_before_each_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    reward_model = RewardModel.from_backbone(tiny_backbone(), tokenizer)
    critic = ValueModel.from_reward_model(reward_model)
    weight = reward_model.head.linear.weight[0]
    expected = []
    for prompt, completion in PAIRS:
        ids = torch.tensor([[*prompt, *completion]])
        states = reward_model.backbone(input_ids=ids).last_hidden_state[0]
        expected.append(states[len(prompt) - 1 : -1] @ weight)
    for form in (pack, pad):
        values = critic(form(GROUPS, pad_id=0))
        for i, row in enumerate(expected):
            torch.testing.assert_close(values[i, : len(row)], row, atol=1e-5, rtol=1e-5)
            assert (values[i, len(row) :] == 0).all()


def test_a_critic_starts_on_the_reward_models_scale_and_apart_from_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    reward_model = RewardModel.from_backbone(tiny_backbone(), tokenizer, lora_rank=2)
    batch = pack(GROUPS, pad_id=0)
    raw = ValueModel.from_reward_model(reward_model)(batch)
    reward_model.reward_std = torch.tensor([4.0])
    critic = ValueModel.from_reward_model(reward_model)
    torch.testing.assert_close(critic(batch), raw / 4)
    assert all(p.requires_grad for p in critic.parameters())
    before = reward_model(batch).means.detach()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1.0)
    assert torch.equal(reward_model(batch).means, before)


def test_other_critics_start_at_zero(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = pack(GROUPS, pad_id=0)
    gaussian = RewardModel.from_backbone(tiny_backbone(), tokenizer, members=2)
    policy = policy_of(tokenizer)
    policy.add_lora(2)
    for critic in (ValueModel.from_reward_model(gaussian), ValueModel.from_policy(policy)):
        values = critic(batch)
        assert (values == 0).all()
        values.sum().backward()
        assert critic.head.linear.weight.grad.abs().max() > 0
    assert tiny_config().hidden_size == critic.head.linear.in_features


def test_exact_token_kl_gives_the_kl_of_completions_in_expectation() -> None:
    """All completions of two tokens are written down: the sequence KL has nothing to sample."""
    policy = GrammarWorld().new_policy(seed=0, hidden_size=16, layers=1)  # some 50 words
    perturb(policy, 0.3)
    ref = policy.frozen_copy()
    perturb(policy, 0.3)
    vocabulary = policy.model.config.vocab_size
    group = Group([3, 4], [[i, j] for i in range(vocabulary) for j in range(vocabulary)])
    for temperature in (1.0, 0.7):
        batch = pad([group], pad_id=0)
        with torch.no_grad():
            logps = policy(batch, temperature=temperature).logprobs.double().sum(1)
            ref_logps = ref(batch, temperature=temperature).logprobs.double().sum(1)
            kl = exact_token_kl(policy, ref, batch, temperature=temperature).double().sum(1)
        chances = logps.exp()
        assert chances.sum().item() == pytest.approx(1.0, abs=1e-5)
        direct = (chances * (logps - ref_logps)).sum().item()
        total = (chances * kl).sum().item()
        assert direct > 0.01
        assert total == pytest.approx(direct, rel=1e-4)
        variance = (chances * (kl - total) ** 2).sum().item()
        assert variance < 0.5 * (chances * (logps - ref_logps - direct) ** 2).sum().item()
        assert kl.min() >= 0


def test_exact_token_kl_of_the_reference_itself_is_zero(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer)
    batch = pad([Group([3, 4], [[5, 6, 7], [8]])], pad_id=0)
    kl = exact_token_kl(policy, policy.frozen_copy(), batch)
    assert torch.equal(kl, torch.zeros(2, 3))


def test_a_rounded_copy_writes_what_the_policy_would(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    copied = policy.rounded_copy(torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in copied.parameters())
    frequencies = dict(copied.model.named_buffers())["model.rotary_emb.inv_freq"]
    assert frequencies.dtype == torch.float32
    for name, value in policy.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    own = copied.model.lm_head.weight
    torch.testing.assert_close(own.float(), policy.model.lm_head.weight, rtol=2**-8, atol=0)
    batch = pack(GROUPS, pad_id=0)
    found = copied(batch.to("cpu", torch.bfloat16)).logprobs
    torch.testing.assert_close(found, policy(batch).logprobs, atol=0.1, rtol=0.05)


def test_tied_weights_stay_tied_in_a_rounded_copy(tokenizer: PreTrainedTokenizerFast) -> None:
    model = policy_of(tokenizer, tie_word_embeddings=True).rounded_copy(torch.bfloat16).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
