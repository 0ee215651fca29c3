from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trueward.data.formats import Prompt
from trueward.evaluate.policy_judge import POLICY_TEMPLATE, policy_judge
from trueward.models.policy import Policy
from trueward.models.scratch import ALPACA_CHAT_TEMPLATE
from trueward.testing import tiny_language_model

SHORT = "{prompt} | {completion_1} | {completion_2} ?\n"


@pytest.fixture
def policy(tokenizer: PreTrainedTokenizerFast) -> Policy:
    """One whose answers hang on what it read: a random model's own logits hardly differ."""
    model = tiny_language_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    tokenizer.chat_template = None
    return Policy(model, tokenizer)


def logp(policy: Policy, ids: list[int], answer: str) -> float:
    """log p of an answer after ids, one token at a time and unpacked."""
    total = 0.0
    for token in policy.tokenizer(answer, add_special_tokens=False).input_ids:
        with torch.no_grad():
            logits = policy.model(torch.tensor([ids])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        ids = [*ids, token]
    return total


def reference(
    policy: Policy, texts: tuple[str, str, str], options: tuple[str, str] = ("1", "2")
) -> float:
    prompt, first, second = texts
    found = []
    for one, other in ((first, second), (second, first)):
        filled = SHORT.format(prompt=prompt, completion_1=one, completion_2=other)
        ids = policy.tokenizer(filled).input_ids
        both = torch.tensor([logp(policy, ids, option) for option in options])
        found.append(float(both.softmax(0)[0]))
    return (found[0] + 1 - found[1]) / 2


PROMPTS = ["why ?", "what is the big house", "tell me about a dog"]
FIRSTS = ["the red cat sees", "blue", "a bird sleeps and runs"]
SECONDS = ["green house", "the dog likes a small tree today", "always"]


@pytest.mark.parametrize("options", [("1", "2"), ("ab", "cd"), ("1", "22")])
def test_the_verdict_is_the_mean_over_both_orders_of_the_answers_probability(
    policy: Policy, options: tuple[str, str]
) -> None:
    verdicts = policy_judge(policy, template=SHORT, options=options)(PROMPTS, FIRSTS, SECONDS)
    expected = [
        reference(policy, texts, options) for texts in zip(PROMPTS, FIRSTS, SECONDS, strict=True)
    ]
    assert verdicts.dtype == torch.float64
    assert verdicts.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(abs(v - 0.5) for v in expected) > 0.01, "a test of verdicts needs some"


def test_swapping_the_completions_swaps_the_verdict(policy: Policy) -> None:
    judge = policy_judge(policy)
    forward, backward = judge(PROMPTS, FIRSTS, SECONDS), judge(PROMPTS, SECONDS, FIRSTS)
    torch.testing.assert_close(forward + backward, torch.ones(3, dtype=torch.float64))


def test_a_preference_for_a_place_cancels(policy: Policy) -> None:
    # Without anything that is read, the model always prefers one of the answers.
    with torch.no_grad():
        policy.backbone.norm.weight.zero_()
        head = policy.model.get_output_embeddings()
        head.weight.zero_()
        token = policy.tokenizer("1", add_special_tokens=False).input_ids[0]
        bias = torch.zeros(head.weight.shape[0])
        bias[token] = 5.0
        head.bias = torch.nn.Parameter(bias)
    verdicts = policy_judge(policy, template=SHORT)(PROMPTS, FIRSTS, SECONDS)
    torch.testing.assert_close(verdicts, torch.full((3,), 0.5, dtype=torch.float64))


def test_equal_texts_are_exactly_a_half(policy: Policy) -> None:
    judge = policy_judge(policy)
    turn = [{"role": "assistant", "content": "blue"}]
    assert judge(["p", "q"], ["blue", "blue"], ["blue", turn]).tolist() == [0.5, 0.5]
    assert judge([], [], []).shape == (0,)


def test_neither_batch_nor_packing_changes_a_verdict(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = policy_judge(policy)(PROMPTS, FIRSTS, SECONDS)
    alone = policy_judge(policy, max_tokens=1)(PROMPTS, FIRSTS, SECONDS)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    policy.backbone._trueward_shares_prefixes = False  # type: ignore[assignment]
    unpacked = policy_judge(policy)(PROMPTS, FIRSTS, SECONDS)
    torch.testing.assert_close(together, unpacked, atol=1e-6, rtol=0)


def test_a_policy_in_training_is_left_so(policy: Policy) -> None:
    policy.train()
    policy_judge(policy, template=SHORT)(PROMPTS, FIRSTS, SECONDS)
    assert policy.training


def asked_texts(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the policy reads before an answer, as text, in the order of the batches."""
    seen: list[str] = []
    forward = policy.forward

    def look(batch: object, **options: object) -> object:
        for ids, end in zip(batch.input_ids[batch.rows], batch.prompt_ends, strict=True):  # type: ignore[attr-defined]
            text = str(policy.tokenizer.decode(ids[: int(end) + 1]))
            if text not in seen:
                seen.append(text)
        return forward(batch, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(policy, "forward", look)
    return seen


def test_several_turns_are_shown_with_their_roles_and_placeholders_stay_text(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked_texts(policy, monkeypatch)
    turns: Prompt = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    policy_judge(policy, template=SHORT)([turns], ["{completion_2}"], ["x"])
    assert sorted(seen) == [
        "user: a\n\nsystem: b | x | {completion_2} ?\n",
        "user: a\n\nsystem: b | {completion_2} | x ?\n",
    ]


def test_a_chat_template_gets_one_user_turn(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.tokenizer.chat_template = ALPACA_CHAT_TEMPLATE
    seen = asked_texts(policy, monkeypatch)
    policy_judge(policy, template=SHORT)(["why"], ["a"], ["b"])
    question = [{"role": "user", "content": "why | a | b ?\n"}]
    rendered = policy.tokenizer.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True
    )
    assert rendered in seen
    assert len(seen) == 2


def lengths(policy: Policy, texts: Sequence[str]) -> list[int]:
    return [len(policy.tokenizer(t, add_special_tokens=False).input_ids) for t in texts]


def test_long_completions_are_cut_at_their_ends_until_they_are_equally_long(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked_texts(policy, monkeypatch)
    frame = lengths(policy, [SHORT.format(prompt="why", completion_1="", completion_2="")])[0]
    policy.max_length = frame + 25
    long, longer, short = "the cat " * 20, "the dog " * 40, "red"
    judge = policy_judge(policy, template=SHORT)
    judge(["why"], [long], [longer])
    judge(["why"], [short], [longer])
    assert len(seen) == 4
    assert max(lengths(policy, seen)) < policy.max_length
    shown = [text.removesuffix(" ?\n").split(" | ") for text in seen]
    assert all(prompt == "why" for prompt, *_ in shown)  # the prompt stays whole
    (_, *cut), (_, *swapped), (_, *kept), _ = shown
    assert cut == swapped[::-1]  # both orders show the same texts
    assert (long.startswith(cut[0]), longer.startswith(cut[1])) == (True, True)
    one, other = lengths(policy, cut)
    assert one == other >= 9, "no more is cut than must be"
    # A short one stays whole, and the other has all the room that it leaves.
    assert kept[0] == short
    assert longer.startswith(kept[1])
    assert lengths(policy, kept)[1] > other + 5


def test_texts_that_a_cut_makes_equal_are_exactly_a_half(policy: Policy) -> None:
    frame = lengths(policy, [SHORT.format(prompt="why", completion_1="", completion_2="")])[0]
    policy.max_length = frame + 14
    ends = ["the cat " * 20 + end for end in ("red", "blue")]
    assert policy_judge(policy, template=SHORT)(["why"], [ends[0]], [ends[1]]).tolist() == [0.5]


def test_a_prompt_without_room_is_one_clear_error(policy: Policy) -> None:
    policy.max_length = 30
    with pytest.raises(ValueError, match="Pair 2: the prompt and the template leave no room"):
        policy_judge(policy, template=SHORT)(["why", "why " * 40], ["a", "b"], ["c", "d"])


def test_templates_and_options_that_cannot_be_used_are_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"template must contain \{completion_2\}, \{prompt\}"):
        policy_judge(policy, template="{completion_1}")
    for options in (("1", "1"), ("1", "10"), ("", "2"), ("no", "")):
        with pytest.raises(ValueError, match="neither begins with the other"):
            policy_judge(policy, options=options)
    with pytest.raises(ValueError, match="got 1 prompts, 2 and 1 completions"):
        policy_judge(policy)(["p"], ["a", "b"], ["c"])
    assert POLICY_TEMPLATE.endswith("\n")
