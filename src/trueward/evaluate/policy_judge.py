"""The policy as its own judge: RLAIF, and the ablation of that name in RLP's Table 5."""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import Completion, Prompt, text_of
from trueward.data.packing import Group
from trueward.data.tokens import prompt_ids
from trueward.evaluate.judges import Judge
from trueward.models.backbone import packed_batches
from trueward.models.policy import Policy

# It ends with a line's end, so that the answer's first token is that of a word at a line's start.
POLICY_TEMPLATE = """\
Below are a prompt and two responses to it. Decide which response is better: more helpful, more \
correct, and closer to what the prompt asks for.

[Prompt]
{prompt}
[End of prompt]

[Response 1]
{completion_1}
[End of response 1]

[Response 2]
{completion_2}
[End of response 2]

Which response is better, 1 or 2? Answer with the number alone.

Answer:
"""

_PLACEHOLDERS = re.compile(r"\{(prompt|completion_1|completion_2)\}")


def policy_judge(
    policy: Policy,
    *,
    template: str = POLICY_TEMPLATE,
    options: tuple[str, str] = ("1", "2"),
    max_tokens: int = 8192,
) -> Judge:
    """A judge that asks the policy: which of two answers it would rather write next.

    With both completions in the template, `p = sigmoid(log pi(options[0]) - log pi(options[1]))` is
    the probability that the first one shown is better, given that one of the two answers is
    written. Both orders are asked and averaged, `(p_12 + 1 - p_21) / 2`, so that a preference for a
    place cancels: Lee et al. 2023 (https://arxiv.org/abs/2309.00267), whose own prompts are not
    used here. Completions with the same text give exactly 1/2.

    A policy with a chat template gets the filled template as one user turn, another one as plain
    text. Where both completions do not fit the policy's context, the longer one is cut at its end,
    then both equally; the prompt stays whole.

    Args:
        policy: Switched to evaluation while it judges.
        template: With {prompt}, {completion_1} and {completion_2}.
        options: The answers for the first and the second one shown; all tokens of them count.
        max_tokens: Padded tokens computed at once.

    Raises:
        ValueError: The template or the options cannot be used; and, from the judge, a prompt that
            leaves no room in the policy's context.
    """
    missing = {"prompt", "completion_1", "completion_2"} - set(_PLACEHOLDERS.findall(template))
    if missing:
        names = ", ".join(f"{{{name}}}" for name in sorted(missing))
        raise ValueError(f"template must contain {names}.")
    answers = [
        list(policy.tokenizer(option, add_special_tokens=False).input_ids) for option in options
    ]
    overlap = options[0].startswith(options[1]) or options[1].startswith(options[0])
    if overlap or not all(answers):
        raise ValueError(
            "options must be two answers of which neither begins with the other, got "
            f"{options[0]!r} and {options[1]!r}."
        )

    def judge(
        prompts: Sequence[Prompt],
        completions_1: Sequence[Completion],
        completions_2: Sequence[Completion],
    ) -> Float[Tensor, " batch"]:
        if not len(prompts) == len(completions_1) == len(completions_2):
            raise ValueError(
                f"a judge needs two completions for each prompt, got {len(prompts)} prompts, "
                f"{len(completions_1)} and {len(completions_2)} completions."
            )
        texts = [
            (_conversation(p), text_of(a), text_of(b))
            for p, a, b in zip(prompts, completions_1, completions_2, strict=True)
        ]
        room = policy.max_length - max(map(len, answers))
        orders = [
            _both_orders(policy, template, *some, room=room, where=f"Pair {i}")
            for i, some in enumerate(texts, start=1)
        ]
        # Equal texts, also equal ones after a cut, are a tie that rounding must not break.
        differing = [i for i, (one, other) in enumerate(orders) if one != other]
        asked = [ids for i in differing for ids in orders[i]]
        margins = _answer_margins(policy, asked, answers, max_tokens)
        first_shown = margins.sigmoid().reshape(len(differing), 2)
        verdicts = torch.full((len(texts),), 0.5, dtype=torch.float64)
        verdicts[differing] = (first_shown[:, 0] + 1 - first_shown[:, 1]) / 2
        return verdicts

    return judge


@torch.no_grad()
def _answer_margins(
    policy: Policy, asked: Sequence[list[int]], answers: list[list[int]], max_tokens: int
) -> Float[Tensor, " asked"]:
    """Return `log pi(first answer) - log pi(second answer)` after each text of ids."""
    margins = torch.zeros(len(asked), dtype=torch.float64)
    groups = [Group(ids, answers) for ids in asked]
    was_training = policy.training
    policy.eval()
    pad_id = int(policy.tokenizer.pad_token_id)
    for some, batch in packed_batches(
        policy.backbone, groups, pad_id=pad_id, max_tokens=max_tokens
    ):
        # Nothing is masked away: `logprobs` is zero beyond an answer's end.
        logps = policy(batch).logprobs.double().sum(1).view(-1, 2).cpu()
        margins[some] = logps[:, 0] - logps[:, 1]
    policy.train(was_training)
    return margins


def _both_orders(
    policy: Policy, template: str, prompt: str, first: str, second: str, *, room: int, where: str
) -> list[list[int]]:
    """Return the ids of the question with `first`, and then with `second`, shown first.

    Both orders hold the same texts, cut until each fits `room` tokens.
    """
    cut_first, cut_second, removed = first, second, 0
    while True:
        orders = [
            _question_ids(policy, template, prompt, *pair)
            for pair in ((cut_first, cut_second), (cut_second, cut_first))
        ]
        over = max(map(len, orders)) - room
        if over <= 0:
            return orders
        # From the whole texts again: a cut text's tokens may be others than the tokens kept of it.
        removed += over
        cut = _shortened(policy, first, second, removed)
        if cut is None:
            raise ValueError(
                f"{where}: the prompt and the template leave no room for two completions in the "
                f"policy's context of {policy.max_length} tokens; leave the prompt out, or give a "
                "shorter template."
            )
        cut_first, cut_second = cut


def _shortened(policy: Policy, first: str, second: str, removed: int) -> tuple[str, str] | None:
    """Return both texts with `removed` tokens less, taken from the longer one until they are equal.

    None where not a token would be left of one of them.
    """
    ids = [
        list(policy.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        for text in (first, second)
    ]
    left = sum(map(len, ids)) - removed
    shorter = min(map(len, ids))
    longest = max(left - shorter, left // 2)
    if longest < 1:
        return None
    kept = [str(policy.tokenizer.decode(some[:longest])) for some in ids]
    return kept[0], kept[1]


def _question_ids(
    policy: Policy, template: str, prompt: str, shown_1: str, shown_2: str
) -> list[int]:
    texts = {"prompt": prompt, "completion_1": shown_1, "completion_2": shown_2}
    # In one pass: a text that holds "{completion_2}" must not be filled in itself.
    question = _PLACEHOLDERS.sub(lambda match: texts[match[1]], template)
    if policy.tokenizer.chat_template:
        return prompt_ids(policy.tokenizer, [{"role": "user", "content": question}])
    return prompt_ids(policy.tokenizer, question)


def _conversation(prompt: Prompt) -> str:
    """The prompt's text; with its roles where it has several turns."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return text_of(prompt)
    return "\n\n".join(f"{turn.get('role', 'user')}: {text_of([turn])}" for turn in prompt)
