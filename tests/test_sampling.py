import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trueward.data import DataError
from trueward.data.packing import Group, pack
from trueward.models.policy import Policy
from trueward.sampling import Sample, SamplingConfig, draw, read_samples, sample, sample_to_file
from trueward.testing import tiny_language_model, tiny_texts

PROMPTS = tiny_texts(5, seed=1)
CONFIG = SamplingConfig(n=3, max_new_tokens=12, seed=0)


def policy_of(
    tokenizer: PreTrainedTokenizerFast, model_type: str = "llama", *, eos: float = 0.0, **options
) -> Policy:
    """A tiny policy; `eos` pulls every state's EOS logit up, so that rows end at unlike steps."""
    model = tiny_language_model(model_type, **options)
    policy = Policy(model, tokenizer)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(4)
    if eos:
        head = policy.model.get_output_embeddings()
        bias = torch.zeros(head.weight.shape[0])
        bias[tokenizer.eos_token_id] = eos
        head.register_forward_hook(lambda _, args, out: out + bias)
    return policy


def drawn(samples: list[Sample]) -> list[tuple]:
    return [(s.prompt_index, s.completion_ids, s.finished) for s in samples]


def logits_after(policy: Policy, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_samples_are_reproducible_and_the_seed_matters(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    policy = policy_of(tokenizer, model_type)
    first = sample(policy, PROMPTS, CONFIG)
    torch.manual_seed(99)  # the global generator plays no part
    assert drawn(sample(policy, PROMPTS, CONFIG)) == drawn(first)
    other = sample(policy, PROMPTS, replace(CONFIG, seed=1))
    assert all(a.completion_ids != b.completion_ids for a, b in zip(first, other, strict=True))


def test_samples_come_in_prompt_order_with_their_prompts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    policy = policy_of(tokenizer)
    samples = sample(policy, PROMPTS, CONFIG)
    assert [s.prompt_index for s in samples] == [i for i in range(5) for _ in range(3)]
    for s in samples:
        assert tokenizer.decode(s.prompt_ids) == PROMPTS[s.prompt_index]
        assert s.text == tokenizer.decode(s.completion_ids, skip_special_tokens=True)
        assert len(s.logprobs) == len(s.completion_ids)
    ids = [tuple(s.completion_ids) for s in samples]
    assert len(set(ids)) == 15  # every completion has noise of its own


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox", "qwen2"])
def test_samples_do_not_depend_on_the_batch(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    policy = policy_of(tokenizer, model_type, eos=3.0)
    together = drawn(sample(policy, PROMPTS, CONFIG))
    assert len({len(ids) for _, ids, _ in together}) > 3
    for max_tokens in (1, 40):
        config = replace(CONFIG, max_tokens=max_tokens)
        assert drawn(sample(policy, PROMPTS, config)) == together
    alone = sample(policy, PROMPTS[3:4], CONFIG, indices=[3])
    assert drawn(alone) == [s for s in together if s[0] == 3]


def test_sample_k_is_the_same_whatever_n_is(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer, eos=3.0)
    three = drawn(sample(policy, PROMPTS, CONFIG))
    one = drawn(sample(policy, PROMPTS, replace(CONFIG, n=1)))
    five = drawn(sample(policy, PROMPTS, replace(CONFIG, n=5)))
    assert one == three[::3]
    assert [s for i, s in enumerate(five) if i % 5 < 3] == three


def test_a_longer_budget_only_adds_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer, eos=3.0)
    short = sample(policy, PROMPTS, replace(CONFIG, max_new_tokens=5))
    long = sample(policy, PROMPTS, replace(CONFIG, max_new_tokens=40))
    for a, b in zip(short, long, strict=True):
        assert b.completion_ids[:5] == a.completion_ids


def test_rows_stop_at_eos_and_leave_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer, eos=3.0)
    sizes = []
    policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    samples = sample(policy, PROMPTS, replace(CONFIG, n=4, max_new_tokens=30))
    eos = tokenizer.eos_token_id
    for s in samples:
        assert s.finished == (s.completion_ids[-1] == eos)
        assert eos not in s.completion_ids[:-1]
        assert s.finished or len(s.completion_ids) == 30
    assert sizes[0][0] == 5  # each prompt once, not once a sample
    lengths = [len(s.completion_ids) for s in samples]
    # After t tokens, of the rows that are computed more than seven in eight still write.
    assert len(sizes) == max(lengths)
    for t, (rows, tokens) in enumerate(sizes[1:], start=1):
        assert tokens == 1
        assert 7 * rows < 8 * sum(n > t for n in lengths) <= 8 * rows
    assert sizes[1][0] > sizes[-1][0]


def test_completions_that_are_cut_are_not_finished(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = sample(policy_of(tokenizer, eos=-99.0), PROMPTS, CONFIG)
    assert not any(s.finished for s in samples)
    assert {len(s.completion_ids) for s in samples} == {12}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_temperature_zero_is_greedy_generation(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    policy = policy_of(tokenizer, model_type, eos=1.5)
    samples = sample(policy, PROMPTS, SamplingConfig(temperature=0.0, max_new_tokens=16))
    for s in samples:
        out = policy.model.generate(
            torch.tensor([s.prompt_ids]),
            attention_mask=torch.ones(1, len(s.prompt_ids), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert s.completion_ids == out[0, len(s.prompt_ids) :].tolist()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_logprobs_equal_those_that_the_policy_computes_again(
    tokenizer: PreTrainedTokenizerFast, model_type: str, temperature: float, top_p: float
) -> None:
    policy = policy_of(tokenizer, model_type, eos=3.0)
    config = replace(CONFIG, temperature=temperature, top_p=top_p)
    samples = sample(policy, PROMPTS, config)
    groups = [
        Group(samples[i].prompt_ids, [s.completion_ids for s in samples[i : i + 3]])
        for i in range(0, 15, 3)
    ]
    batch = pack(groups, pad_id=tokenizer.pad_token_id)
    with torch.no_grad():
        scores = policy(batch, temperature=temperature or 1.0)
    for row, s in zip(scores.logprobs, samples, strict=True):
        expected = row[: len(s.logprobs)]
        torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_the_policys_mode_is_restored(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer).train()
    sample(policy, PROMPTS[:1], CONFIG)
    assert policy.training
    assert not sample(policy, [], CONFIG)


def test_a_policy_with_adapters_samples_with_them(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer)
    plain = drawn(sample(policy, PROMPTS, CONFIG))
    policy.add_lora(2)
    assert drawn(sample(policy, PROMPTS, CONFIG)) == plain
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    assert drawn(sample(policy, PROMPTS, CONFIG)) != plain
    with policy.adapter_off():
        assert drawn(sample(policy, PROMPTS, CONFIG)) == plain


def test_messages_are_continued_after_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    message = [{"role": "user", "content": "what is the cat"}]
    (first,) = sample(policy_of(tokenizer), [message], SamplingConfig(max_new_tokens=4))
    assert (
        tokenizer.decode(first.prompt_ids) == "### Instruction:\nwhat is the cat\n\n### Response:"
    )


def test_a_prompt_without_room_or_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer, max_positions=32)
    with pytest.raises(DataError, match=r"Prompt 2 has \d+ tokens and the policy reads 32"):
        sample(policy, ["the cat", "cat " * 40], CONFIG)
    with pytest.raises(DataError, match="Prompt 1 is empty"):
        sample(policy, [""], CONFIG)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_near_the_end_of_the_context_each_row_has_its_own_room(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    policy = policy_of(tokenizer, model_type, max_positions=32, eos=-99.0)
    prompts = ["the cat", "the " * 27]
    config = SamplingConfig(max_new_tokens=12)
    samples = sample(policy, prompts, config)
    room = 32 - len(samples[1].prompt_ids)
    assert [len(s.completion_ids) for s in samples] == [12, room]
    assert 0 < room < 12
    assert not samples[1].finished
    alone = sample(policy, prompts[:1], config)
    assert drawn(alone) == drawn(samples[:1])


# --- drawing -------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.05, 0.4, 0.0, 0.15, 0.3, 0.1])


def chi_square(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert (counts[expected == 0] == 0).all()
    wanted = expected[expected > 0].double() * len(tokens)
    return float(((counts[expected > 0] - wanted) ** 2 / wanted).sum())


def draws(temperature: float, top_p: float, count: int = 20_000) -> torch.Tensor:
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    logits = PROBABILITIES.log().expand(count, -1)
    return draw(logits, uniform, temperature=temperature, top_p=top_p)[0]


# Five categories at most have four degrees of freedom: P(chi2 > 18.5) = 0.001.


def test_draws_follow_the_probabilities() -> None:
    assert chi_square(draws(1.0, 1.0), PROBABILITIES) < 18.5


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_follow_the_temperature(temperature: float) -> None:
    expected = PROBABILITIES ** (1 / temperature)
    tokens = draws(temperature, 1.0)
    assert chi_square(tokens, expected / expected.sum()) < 18.5
    assert chi_square(tokens, PROBABILITIES) > 1000


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.65, [1, 4]), (0.72, [1, 3, 4]), (0.88, [1, 3, 4, 5]), (0.01, [1])]
)
def test_draws_keep_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int]) -> None:
    expected = torch.zeros(6)
    expected[kept] = PROBABILITIES[kept]
    assert chi_square(draws(1.0, top_p), expected / expected.sum()) < 18.5


def test_top_p_cuts_after_the_temperature() -> None:
    # At temperature 0.5 the two likeliest hold 0.25 / 0.285 of the mass, at 1 only 0.7.
    assert set(draws(0.5, 0.8).tolist()) == {1, 4}


def test_draw_inverts_the_cumulative_distribution_and_returns_uncut_logprobs() -> None:
    logits = PROBABILITIES.log().expand(5, -1)
    uniform = torch.tensor([0.0, 0.04, 0.06, 0.5, 1.0 - 2**-24])
    tokens, logprobs = draw(logits, uniform, temperature=1.0, top_p=1.0)
    assert tokens.tolist() == [0, 0, 1, 3, 5]  # the token without mass is never drawn
    torch.testing.assert_close(logprobs, PROBABILITIES[tokens].log())
    tokens, logprobs = draw(logits, uniform, temperature=1.0, top_p=0.65)
    assert tokens.tolist() == [1, 1, 1, 1, 4]
    torch.testing.assert_close(logprobs, PROBABILITIES[tokens].log())


def test_draw_never_takes_a_token_without_mass_at_the_edges() -> None:
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(2, -1)
    tokens, _ = draw(logits, torch.tensor([0.0, 1.0]), temperature=1.0, top_p=1.0)
    assert tokens.tolist() == [1, 2]
    many = torch.full((1, 50_000), -20.0)
    many[0, :3] = 0.0
    token, _ = draw(many, torch.tensor([1.0]), temperature=1.0, top_p=0.9)
    assert token.item() < 3


def test_greedy_ignores_the_noise() -> None:
    logits = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(logits, torch.rand(64), temperature=0.0, top_p=1.0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_whole_completions_follow_the_policy(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = policy_of(tokenizer)
    samples = sample(policy, [PROMPTS[0]], SamplingConfig(n=4000, max_new_tokens=1))
    expected = logits_after(policy, samples[0].prompt_ids)[-1].softmax(-1)
    counts = torch.bincount(torch.tensor([s.completion_ids[0] for s in samples]), minlength=320)
    common = expected > 5 / 4000
    z = (counts[common] - 4000 * expected[common]) / (4000 * expected[common]).sqrt()
    assert z.square().mean() < 1.5


# --- configuration, files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"top_p": 1.1}, "top_p must lie in"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"engine": "magic"}, "engine must be 'transformers' or 'vllm', got 'magic'"),
    ],
)
def test_a_bad_configuration_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**values)


def test_a_missing_vllm_names_the_remedy(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DataError, match="pip install"):
        sample(policy_of(tokenizer), PROMPTS, replace(CONFIG, engine="vllm"))


def test_a_file_of_samples_holds_what_sampling_in_memory_gives(
    tokenizer: PreTrainedTokenizerFast, tmp_path
) -> None:
    policy = policy_of(tokenizer, eos=3.0)
    samples = sample(policy, PROMPTS, CONFIG)
    path = tmp_path / "samples.jsonl"
    statistics = sample_to_file(policy, PROMPTS, CONFIG, path, shard_size=2)
    assert list(tmp_path.iterdir()) == [path]
    texts = [s.text for s in samples]
    assert read_samples(path) == [(p, texts[3 * i : 3 * i + 3]) for i, p in enumerate(PROMPTS)]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [f for row in rows for f in row["finished"]] == [s.finished for s in samples]
    assert rows[0]["logps"][0] == pytest.approx(sum(samples[0].logprobs), abs=1e-4)
    assert statistics["prompts"] == 5
    assert statistics["completions"] == 15
    assert statistics["finished"] == pytest.approx(sum(s.finished for s in samples) / 15)
    assert statistics["mean_characters"] == pytest.approx(sum(map(len, texts)) / 15)


def test_a_killed_run_goes_on_at_its_first_missing_shard(
    tokenizer: PreTrainedTokenizerFast, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tokenizer, eos=3.0)
    sample_to_file(policy, PROMPTS, CONFIG, tmp_path / "whole.jsonl", shard_size=2)
    calls = []

    def dies_at_the_second(*args, **kwargs):
        calls.append(list(kwargs["indices"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr("trueward.sampling.sample", dies_at_the_second)
    path = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample_to_file(policy, PROMPTS, CONFIG, path, shard_size=2)
    assert not path.exists()
    sample_to_file(policy, PROMPTS, CONFIG, path, shard_size=2)
    assert calls == [[0, 1], [2, 3], [2, 3], [4]]  # the first shard was not drawn again
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("change", ["seed", "shard_size", "prompts"])
def test_shards_of_another_run_are_not_mixed_in(
    tokenizer: PreTrainedTokenizerFast, tmp_path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    policy = policy_of(tokenizer, eos=3.0)
    path = tmp_path / "samples.jsonl"
    calls = []

    def dies_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("trueward.sampling.sample", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            sample_to_file(policy, PROMPTS, CONFIG, path, shard_size=2)
    config = replace(CONFIG, seed=1) if change == "seed" else CONFIG
    size = 1 if change == "shard_size" else 2
    prompts = PROMPTS[::-1] if change == "prompts" else PROMPTS
    sample_to_file(policy, prompts, config, path, shard_size=size)
    texts = [s.text for s in sample(policy, prompts, config)]
    assert read_samples(path) == [(p, texts[3 * i : 3 * i + 3]) for i, p in enumerate(prompts)]
