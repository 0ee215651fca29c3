import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trueward.data import DataError
from trueward.data.tokens import (
    Tokens,
    completion_text,
    end_token_id,
    ensure_pad_token,
    prompt_ids,
    prompt_text,
    start_token_id,
    tokenize,
    truncate_prompt,
)

USER = [{"role": "user", "content": "what is the cat"}]
# As in Llama 3: the template writes the BOS itself. As in Qwen: a newline after the turn's end.
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As in DeepSeek R1: the generation prompt opens a thought that a finished turn does not show.
THINKING = TEMPLATE.replace("[assistant]{% endif %}", "[assistant]<think>\n{% endif %}")


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that opens every text with BOS, as Llama's does."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A $B",
        special_tokens=[("<bos>", tokenizer.bos_token_id)],
    )
    return tokenizer


def word_tokenizer(single: str, **special: str) -> PreTrainedTokenizerFast:
    words = ["a", "b", "c", "d", "[UNK]", *dict.fromkeys(special.values())]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(w, vocabulary[w]) for w in words if w in single]
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=used
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special)


def bert_like() -> PreTrainedTokenizerFast:
    return word_tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


def test_the_pad_token_is_made_distinct_from_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not ensure_pad_token(tokenizer)  # it has one: nothing to do
    assert tokenizer.pad_token == "<pad>"
    size = len(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert ensure_pad_token(tokenizer)
    assert tokenizer.pad_token_id == size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not ensure_pad_token(tokenizer)
    assert len(tokenizer) == size + 1


def test_an_encoder_without_eos_ends_with_sep_and_starts_with_cls() -> None:
    bert = bert_like()
    assert not ensure_pad_token(bert)
    assert end_token_id(bert) == bert.sep_token_id
    assert start_token_id(bert) == bert.cls_token_id


def test_ids_of_zero_count_as_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = "<pad>"  # id 0, which is falsy
    tokenizer.pad_token = None
    assert end_token_id(tokenizer) == 0
    assert ensure_pad_token(tokenizer)
    assert tokenize(tokenizer, "a", "b").completion_ids[-1] == 0


def test_a_tokenizer_without_any_end_is_refused() -> None:
    with pytest.raises(DataError, match=r"no EOS token: set tokenizer\.eos_token"):
        ensure_pad_token(word_tokenizer("$A"))


def test_strings_pass_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_text(tokenizer, "the cat") == "the cat"
    assert completion_text(tokenizer, "the cat", " sees") == " sees"
    tokens = tokenize(tokenizer, "the cat", " sees")
    assert tokenizer.decode(tokens.prompt_ids) == "the cat"
    assert tokenizer.decode(tokens.completion_ids) == " sees<eos>"


def test_prompt_ids_are_what_a_policy_reads_before_it_writes(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for prompt, completion in (("the cat", " sees"), (USER, "a dog")):
        assert tokenize(tokenizer, prompt, completion).prompt_ids == prompt_ids(tokenizer, prompt)


@pytest.mark.parametrize(
    "written", ["the dog", "the dog<eos>", "the dog<eos>\n", "the dog<eos><eos>", "the dog<eos> \n"]
)
def test_a_completion_ends_with_exactly_one_eos(
    tokenizer: PreTrainedTokenizerFast, written: str
) -> None:
    ids = tokenize(tokenizer, "what", written).completion_ids
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == "the dog<eos>"


def test_a_cut_completion_has_no_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenize(tokenizer, "what", "the dog", eos=False).completion_ids
    assert tokenizer.decode(ids) == "the dog"
    messages = [{"role": "assistant", "content": "the dog"}]
    ids = tokenize(tokenizer, USER, messages, eos=False).completion_ids
    assert tokenizer.decode(ids) == "the dog"


def test_an_eos_before_more_text_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenize(tokenizer, "what", "a<eos>b").completion_ids
    assert tokenizer.decode(ids) == "a<eos>b<eos>"


def test_a_template_that_closes_with_eos_and_newline_gives_one_eos(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = TEMPLATE
    for completion in ("a dog", [{"role": "assistant", "content": "a dog"}]):
        tokens = tokenize(tokenizer, USER, completion)
        assert tokenizer.decode(tokens.completion_ids) == "a dog<eos>"
        assert tokenizer.decode(tokens.prompt_ids) == "<bos>[user]what is the cat[assistant]"


def test_a_completion_of_several_turns_keeps_the_inner_eos(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = TEMPLATE
    turns = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    ids = tokenize(tokenizer, USER, turns).completion_ids
    assert tokenizer.decode(ids) == "a<eos>\n[user]b[assistant]c<eos>"


def test_messages_get_one_bos_though_both_template_and_tokenizer_add_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = with_bos(tokenizer)
    tokenizer.chat_template = TEMPLATE
    ids = prompt_ids(tokenizer, USER)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in tokenize(tokenizer, USER, "a").completion_ids


def test_a_template_without_bos_gets_none(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt_ids(with_bos(tokenizer), USER)
    assert tokenizer.bos_token_id not in ids


def test_a_string_gets_the_tokenizers_own_bos_once(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_bos(tokenizer)
    plain = prompt_ids(tokenizer, "what")
    assert plain.count(tokenizer.bos_token_id) == 1
    assert prompt_ids(tokenizer, "<bos>what") == plain  # templated elsewhere
    assert tokenizer.bos_token_id not in tokenize(tokenizer, "what", " a").completion_ids


def test_an_encoders_sep_stands_after_the_answer_only() -> None:
    bert = bert_like()
    tokens = tokenize(bert, "a b", "c d")
    joined = bert.convert_ids_to_tokens([*tokens.prompt_ids, *tokens.completion_ids])
    assert joined == ["[CLS]", "a", "b", "c", "d", "[SEP]"]


def test_an_eos_that_the_prompt_itself_ends_with_stays(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # DialoGPT's template marks turns by EOS alone; in OPT the BOS is the EOS.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert tokenizer.decode(prompt_ids(tokenizer, USER)) == "what is the cat<eos>"
    opt = word_tokenizer("</s> $A", bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    assert opt.convert_ids_to_tokens(prompt_ids(opt, "a b")) == ["</s>", "a", "b"]
    assert opt.convert_ids_to_tokens(prompt_ids(opt, "a </s>")) == ["</s>", "a", "</s>"]
    assert opt.convert_ids_to_tokens(prompt_ids(opt, "")) == ["</s>"]


def test_a_closing_eos_of_the_tokenizer_leaves_the_prompt() -> None:
    t5 = word_tokenizer("$A </s>", eos_token="</s>", pad_token="<pad>")
    tokens = tokenize(t5, "a b", "c")
    assert t5.convert_ids_to_tokens(tokens.prompt_ids) == ["a", "b"]
    assert t5.convert_ids_to_tokens(tokens.completion_ids) == ["c", "</s>"]


@pytest.mark.parametrize("answer", ["a dog", "<b>bold</b>"])
def test_a_prefilled_thought_is_not_counted_twice(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    tokenizer.chat_template = THINKING
    assert prompt_text(tokenizer, USER).endswith("[assistant]<think>\n")
    assert completion_text(tokenizer, USER, answer) == f"{answer}<eos>\n"
    tokens = tokenize(tokenizer, USER, answer)
    joined = tokenizer.decode([*tokens.prompt_ids, *tokens.completion_ids])
    assert joined == f"<bos>[user]what is the cat[assistant]{answer}<eos>"


def test_a_template_that_rewrites_the_prompt_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="renders the prompt differently"):
        tokenize(tokenizer, USER, "a dog")


def test_messages_need_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        tokenize(tokenizer, USER, "a dog")
    with pytest.raises(DataError, match="no chat template"):
        prompt_ids(tokenizer, USER)


def test_a_string_prompt_with_a_message_completion_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(DataError, match="prompt is a string but the completion is a list"):
        tokenize(tokenizer, "a", [{"role": "assistant", "content": "b"}])


def test_truncation_cuts_the_prompt_from_the_left_and_keeps_bos_answer_and_eos() -> None:
    tokens = Tokens([1, 10, 11, 12, 13], [20, 21, 2])
    assert truncate_prompt(tokens, 8, bos_token_id=1) == tokens
    assert truncate_prompt(tokens, 7, bos_token_id=1) == Tokens([1, 11, 12, 13], [20, 21, 2])
    assert truncate_prompt(tokens, 5, bos_token_id=1) == Tokens([1, 13], [20, 21, 2])
    assert truncate_prompt(tokens, 6) == Tokens([11, 12, 13], [20, 21, 2])


def test_with_room_for_one_prompt_token_the_latest_is_kept() -> None:
    tokens = Tokens([1, 10, 11], [20, 2])
    assert truncate_prompt(tokens, 3, bos_token_id=1) == Tokens([11], [20, 2])


def test_an_answer_that_does_not_fit_gives_none() -> None:
    assert truncate_prompt(Tokens([1, 10], [20, 21, 2]), 3, bos_token_id=1) is None
    assert truncate_prompt(Tokens([1, 10], [20, 21, 2]), 2, bos_token_id=1) is None
    assert truncate_prompt(Tokens([], [20, 21, 2]), 3) == Tokens([], [20, 21, 2])
