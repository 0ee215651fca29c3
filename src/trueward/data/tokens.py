"""Rows to token ids: one way of rendering for training, scoring and sampling.

A prompt is a string or a list of messages; messages go through the tokenizer's chat template. The
prompt and the completion are tokenised apart, because that is what a policy sees when it continues
a prompt: tokenising the joined text can merge tokens across the seam.
"""

from os.path import commonprefix
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from trueward.data.formats import Completion, DataError, Prompt


class Tokens(NamedTuple):
    """The ids of one prompt and of one of its completions."""

    prompt_ids: list[int]
    completion_ids: list[int]


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a pad token distinct from its EOS; return True if the vocabulary grew.

    Pad equal to EOS hides the EOS from masks made of ids, and made older sequence classifiers read
    the wrong token (https://arxiv.org/abs/2403.17031).
    """
    end = end_token_id(tokenizer)
    if end is None:
        raise DataError("The tokenizer has no EOS token: set tokenizer.eos_token first.")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != end:
        return False
    return tokenizer.add_special_tokens({"pad_token": "<|pad|>"}) > 0


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that ends a completion: EOS, or [SEP] where an encoder has no EOS."""
    ids = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return next((int(i) for i in ids if i is not None), None)


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that opens a text: BOS, or [CLS], which encoder heads read."""
    ids = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    return next((int(i) for i in ids if i is not None), None)


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return the text that the policy continues: the string itself, or the rendered messages."""
    if isinstance(prompt, str):
        return prompt
    _require_template(tokenizer)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def completion_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion
) -> str:
    """Return the completion's text, as the chat template renders it after the prompt."""
    return _split_text(tokenizer, prompt, completion)[1]


def _split_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion
) -> tuple[str, str]:
    """Return the texts of prompt and completion, which joined are what the template renders."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(prompt, str):
        raise DataError("The prompt is a string but the completion is a list of messages.")
    turns = [{"role": "assistant", "content": completion}]
    messages = list(prompt) + (turns if isinstance(completion, str) else list(completion))
    _require_template(tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(whole, str)
    with_opening = prompt_text(tokenizer, prompt)
    if whole.startswith(with_opening):
        return with_opening, whole[len(with_opening) :]
    # Some templates open the assistant's turn differently when they generate (a prefilled <think>,
    # say): then the prompt is the longest start that both agree on, whatever the answer's own.
    any_answer = [*prompt, {"role": "assistant", "content": "0"}]
    rendered = [tokenizer.apply_chat_template(m, tokenize=False) for m in (prompt, any_answer)]
    shared = commonprefix([with_opening, str(rendered[1])])  # noqa: RUF071  (texts, not paths)
    if len(shared) >= len(rendered[0]) and whole.startswith(shared):
        return shared, whole[len(shared) :]
    raise DataError(
        "The chat template renders the prompt differently once a completion follows it, so the "
        "completion's tokens cannot be told apart: use a template that only appends."
    )


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            "The prompt is a list of messages but the tokenizer has no chat template: set "
            "tokenizer.chat_template (models.scratch.ALPACA_CHAT_TEMPLATE is a plain one), or "
            "give prompts and completions as strings."
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the prompt's ids; a template brings its own BOS, so none is added to its text."""
    text = prompt_text(tokenizer, prompt)
    return _ids_of_prompt_text(tokenizer, text, templated=not isinstance(prompt, str))


def _ids_of_prompt_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, templated: bool
) -> list[int]:
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if templated:
        return plain
    ids = list(tokenizer(text).input_ids)
    # BERT-like tokenizers close with [SEP], T5-like ones with </s>: that belongs after the answer.
    closers = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    while ids[len(ids) - len(plain) :] != plain and ids[-1] in closers:
        ids = ids[:-1]
    # A string that was rendered by a template elsewhere brings its BOS as text.
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion, *, eos: bool = True
) -> Tokens:
    """Return the ids of prompt and completion; the completion ends with exactly one EOS.

    Args:
        tokenizer: Of the model that will read the ids.
        prompt: String or messages.
        completion: String or messages.
        eos: False for a completion that was cut off before it ended (a truncated sample).
    """
    before, text = _split_text(tokenizer, prompt, completion)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    end = end_token_id(tokenizer)
    # A template often closes the turn with EOS and a newline; what follows EOS is never sampled.
    while end is not None and end in ids:
        last = len(ids) - 1 - ids[::-1].index(end)
        if str(tokenizer.decode(ids[last + 1 :], skip_special_tokens=True)).strip():
            break
        ids = ids[:last]
    if eos and end is not None:
        ids.append(end)
    templated = not isinstance(prompt, str)
    return Tokens(_ids_of_prompt_text(tokenizer, before, templated=templated), ids)


def truncate_prompt(
    tokens: Tokens, max_length: int, *, bos_token_id: int | None = None
) -> Tokens | None:
    """Cut the prompt from the left so that prompt and completion fit; the answer stays whole.

    A leading BOS stays in place. Returns None where the completion alone (with its EOS and one
    prompt token) does not fit: the caller counts that row as over-long.
    """
    room = max_length - len(tokens.completion_ids)
    prompt, completion = tokens
    if room >= len(prompt):
        return tokens
    if room < 1:
        return None
    if prompt[0] == bos_token_id and room > 1:
        return Tokens([prompt[0], *prompt[len(prompt) - room + 1 :]], completion)
    return Tokens(prompt[-room:], completion)
