"""Reward inputs: ids as they are between equal tokenizers, text between different ones, templates for chats, and no silent cut."""

from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch, StopReason
from rlhf_dist.models.classifier import EncodedTexts
from rlhf_dist.models.reward_model import separate_pad
from rlhf_dist.rewards.text import RewardEncoder, same_tokenizer

WORDS = ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]", "<unk>", "user", "assistant", ":", "once", "upon", "a", "time", "there", "was", "end"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
OTHER_TEMPLATE = "{% for m in messages %}[CLS] {{ m['content'] }} {% endfor %}"


def tokenizer(
    words: Sequence[str] = WORDS, *, lower: bool = False, wraps: bool = False, template: str | None = None, limit: int = 10**9
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        backend.normalizer = normalizers.Lowercase()
    if wraps:
        marks = [("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=limit,
    )
    made.chat_template = template
    return made


REVERSED = [*WORDS[:6], *reversed(WORDS[6:])]


def ids(text: str, words: Sequence[str] = WORDS) -> list[int]:
    return [words.index(word) for word in text.split()]


def batch(rows: Sequence[tuple[str, str]], stop: StopReason = StopReason.STOP_TOKEN, **columns) -> ExperienceBatch:
    """Rows of (prompt, response) in words of the policy; padding holds junk."""
    prompts, responses = [ids(p) for p, _ in rows], [ids(r) for _, r in rows]
    width_p, width_t = max(map(len, prompts)), max(map(len, responses), default=0)
    count = len(rows)
    prompt_mask = torch.tensor([[False] * (width_p - len(p)) + [True] * len(p) for p in prompts])
    response_mask = torch.tensor([[True] * len(r) + [False] * (width_t - len(r)) for r in responses]).reshape(count, width_t)
    return ExperienceBatch(
        prompt_tokens_BP=torch.tensor([[99] * (width_p - len(p)) + p for p in prompts]),
        prompt_mask_BP=prompt_mask,
        response_tokens_BT=torch.tensor([r + [99] * (width_t - len(r)) for r in responses], dtype=torch.long).reshape(count, width_t),
        response_mask_BT=response_mask,
        response_attention_BT=response_mask,
        prompt_id_B=torch.zeros(count, dtype=torch.long),
        sample_index_B=torch.zeros(count, dtype=torch.long),
        policy_version_B=torch.zeros(count, dtype=torch.long),
        stop_reason_B=torch.full((count,), int(stop)),
        rollout_logprobs_BT=torch.zeros(count, width_t),
        prompts=tuple(p for p, _ in rows),
        completions=tuple(" ".join(w for w in r.split() if w != "</s>") for _, r in rows),
        columns={key: tuple(value) for key, value in columns.items()},
    )


def rows_of(texts: EncodedTexts) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(texts.tokens_BL, texts.mask_BL, strict=True)]


STORY = [("<s> once upon", "a time </s>"), ("<s> there", "was a time end </s>")]


def test_equal_tokenizers_are_recognised_across_objects() -> None:
    one = tokenizer()
    assert same_tokenizer(one, one)
    assert same_tokenizer(one, tokenizer(template=TEMPLATE, limit=7)), "neither template nor limit changes what a text becomes"


def test_padding_and_truncation_do_not_make_a_tokenizer_another() -> None:
    one, other = tokenizer(), tokenizer()
    other("once upon", truncation=True, max_length=1)
    assert same_tokenizer(one, other)


@pytest.mark.parametrize(
    "other",
    [tokenizer(REVERSED), tokenizer([*WORDS, "more"]), tokenizer(lower=True), tokenizer(wraps=True)],
    ids=["ids", "vocabulary", "normaliser", "post-processor"],
)
def test_tokenizers_that_differ(other: PreTrainedTokenizerFast) -> None:
    assert not same_tokenizer(tokenizer(), other)


def extended() -> PreTrainedTokenizerFast:
    """The policy's tokenizer with a pad of its own, as reward models are saved with."""
    made = tokenizer()
    separate_pad(made, (2,))
    assert len(made) == len(tokenizer()) + 1
    return made


def test_a_reward_model_with_a_pad_of_its_own_reads_the_policys_ids() -> None:
    assert same_tokenizer(extended(), tokenizer()), "stop token included"
    assert not same_tokenizer(tokenizer(), extended()), "the policy may write what the reward model does not know"
    encoder = RewardEncoder(extended(), tokenizer(), None, "error")
    assert rows_of(encoder.encode(batch(STORY))) == [ids("<s> once upon a time </s>"), ids("<s> there was a time end </s>")]


def test_between_equal_tokenizers_the_ids_pass_unchanged() -> None:
    encoder = RewardEncoder(tokenizer(), tokenizer(), None, "error")
    assert encoder.same_tokenizer
    assert rows_of(encoder.encode(batch(STORY))) == [ids("<s> once upon a time </s>"), ids("<s> there was a time end </s>")]


def test_between_different_tokenizers_the_text_is_tokenised_again() -> None:
    encoder = RewardEncoder(tokenizer(REVERSED, wraps=True), tokenizer(), None, "error")
    expected = ["[CLS] once upon a time [SEP]", "[CLS] there was a time end [SEP]"]
    assert rows_of(encoder.encode(batch(STORY))) == [ids(text, REVERSED) for text in expected]


def test_a_stop_token_that_is_an_ordinary_word_is_not_judged_but_a_last_word_is() -> None:
    encoder = RewardEncoder(tokenizer(REVERSED), tokenizer(), None, "error")
    rows = [("once", "upon a end")]
    assert rows_of(encoder.encode(batch(rows, StopReason.STOP_TOKEN))) == [ids("once upon a", REVERSED)]
    for stop in (StopReason.LENGTH, StopReason.STOP_STRING):
        assert rows_of(encoder.encode(batch(rows, stop))) == [ids("once upon a end", REVERSED)]


def test_a_space_at_the_seam_survives() -> None:
    """Metaspace decoders drop a leading space: decoding the completion alone would glue it to the prompt."""
    words = ["<unk>", "</s>", "▁once", "▁upon", "onceupon", "▁a"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    policy = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert policy.decode([3]) == "upon"
    story = batch([("once", "upon </s>")]).replace(prompt_tokens_BP=torch.tensor([[2]]), response_tokens_BT=torch.tensor([[3, 1]]))
    assert rows_of(RewardEncoder(tokenizer(), policy, None, "error").encode(story)) == [ids("once upon")]


def test_a_row_without_text_gets_no_tokens() -> None:
    encoder = RewardEncoder(tokenizer(REVERSED, wraps=True), tokenizer(), None, "error")
    assert encoder.encode(batch([("<s>", "</s>"), ("once", "</s>")])).lengths == [0, 3]


CHAT = [[{"role": "user", "content": "once upon", "name": None}], [{"role": "user", "content": [{"type": "text", "text": "there was"}]}]]
PROMPTS = ["user : once upon assistant :", "user : there was assistant :"]


@pytest.mark.parametrize("words", [WORDS, REVERSED], ids=["same tokenizer", "other tokenizer"])
def test_a_chat_is_put_into_the_reward_models_own_template(words: list[str]) -> None:
    encoder = RewardEncoder(
        tokenizer(words, wraps=True, template=OTHER_TEMPLATE), tokenizer(wraps=words is WORDS, template=TEMPLATE), None, "error"
    )
    assert encoder.same_tokenizer == (words is WORDS)
    texts = encoder.encode(batch([(PROMPTS[0], "a time </s>"), (PROMPTS[1], "a </s>")], messages=CHAT))
    assert rows_of(texts) == [ids("[CLS] once upon [CLS] a time", words), ids("[CLS] there was [CLS] a", words)], "no special tokens twice"


def test_with_the_same_template_and_tokenizer_the_ids_pass_unchanged() -> None:
    encoder = RewardEncoder(tokenizer(template=TEMPLATE), tokenizer(template=TEMPLATE), None, "error")
    assert rows_of(encoder.encode(batch([(PROMPTS[0], "a </s>")], messages=CHAT[:1]))) == [ids(f"{PROMPTS[0]} a </s>")]


def test_a_prompt_cut_from_the_left_still_comes_from_its_messages() -> None:
    encoder = RewardEncoder(tokenizer(REVERSED, template=OTHER_TEMPLATE), tokenizer(template=TEMPLATE), None, "error")
    assert rows_of(encoder.encode(batch([("upon assistant :", "a </s>")], messages=CHAT[:1]))) == [ids("[CLS] once upon [CLS] a", REVERSED)]


@pytest.mark.parametrize(
    "messages",
    [None, CHAT[1], [*CHAT[0], {"role": "assistant", "content": "a time"}], "text"],
    ids=["no messages", "of another prompt", "a whole conversation", "not a chat"],
)
def test_messages_that_the_prompt_was_not_made_from_are_not_judged(messages) -> None:
    encoder = RewardEncoder(tokenizer(REVERSED, template=OTHER_TEMPLATE), tokenizer(template=TEMPLATE), None, "error")
    assert rows_of(encoder.encode(batch([("once upon", "a </s>")], messages=[messages]))) == [ids("once upon a", REVERSED)]


def test_the_messages_column_may_have_another_name() -> None:
    encoder = RewardEncoder(
        tokenizer(REVERSED, template=OTHER_TEMPLATE), tokenizer(template=TEMPLATE), None, "error", messages_field="chat"
    )
    assert rows_of(encoder.encode(batch([(PROMPTS[0], "a </s>")], chat=CHAT[:1]))) == [ids("[CLS] once upon [CLS] a", REVERSED)]


def test_a_template_that_refuses_names_the_row() -> None:
    strict = "{{ raise_exception('no user here') }}"
    encoder = RewardEncoder(tokenizer(template=strict), tokenizer(template=TEMPLATE), None, "error")
    with pytest.raises(UserError, match="the chat template refuses the messages: no user here") as caught:
        encoder.encode(batch([(PROMPTS[0], "a </s>")], messages=CHAT[:1]))
    assert caught.value.where == "reward model input, row 0"


def test_a_broken_template_of_the_reward_model_is_its_own_fault() -> None:
    encoder = RewardEncoder(tokenizer(template="{{ messages[0].a.b }}"), tokenizer(template=TEMPLATE), None, "error")
    with pytest.raises(UserError, match="the chat template is broken") as caught:
        encoder.encode(batch([(PROMPTS[0], "a </s>")], messages=CHAT[:1]))
    assert caught.value.where == "reward model input, row 0" and "mend chat_template" in caught.value.fix


@pytest.mark.parametrize("words, tokens", [(WORDS, 7), (REVERSED, 5)], ids=["ids", "text"])
def test_too_long_is_an_error_with_row_tokens_and_limit(words: list[str], tokens: int) -> None:
    encoder = RewardEncoder(tokenizer(words), tokenizer(), 4, "error")
    with pytest.raises(UserError, match=f"row 1: prompt and completion have {tokens} tokens for the reward model, which takes 4"):
        encoder.encode(batch([("<s> once", "a </s>"), STORY[1]]))


def test_truncation_keeps_the_end_and_is_counted() -> None:
    texts = RewardEncoder(tokenizer(), tokenizer(), 4, "truncate_left").encode(batch([("<s> once", "a </s>"), STORY[1]]))
    assert rows_of(texts) == [ids("<s> once a </s>"), ids("<s> time end </s>")]
    assert texts.truncated == 1


def test_truncated_text_keeps_the_tokens_that_the_tokenizer_adds() -> None:
    theirs = tokenizer(REVERSED, wraps=True)
    texts = RewardEncoder(theirs, tokenizer(), 4, "truncate_left").encode(batch([STORY[1], ("once", "a </s>")]))
    assert rows_of(texts) == [ids("[CLS] time end [SEP]", REVERSED), ids("[CLS] once a [SEP]", REVERSED)]
    assert texts.truncated == 1
    assert theirs.truncation_side == "right", "the caller's tokenizer is left alone"


def test_truncated_chats_are_counted_too() -> None:
    encoder = RewardEncoder(tokenizer(REVERSED, template=OTHER_TEMPLATE), tokenizer(template=TEMPLATE), 3, "truncate_left")
    texts = encoder.encode(batch([(PROMPTS[0], "a time </s>")], messages=CHAT[:1]))
    assert rows_of(texts) == [ids("[CLS] a time", REVERSED)] and texts.truncated == 1


def test_a_limit_without_room_for_text_is_refused() -> None:
    with pytest.raises(UserError, match="no room for text"):
        RewardEncoder(tokenizer(REVERSED, wraps=True), tokenizer(), 2, "truncate_left")


def test_truncated_ids_keep_their_start_token_only_where_they_had_one() -> None:
    texts = RewardEncoder(tokenizer(), tokenizer(), 3, "truncate_left").encode(
        batch([("<s> once upon", "a </s>"), ("once upon", "a </s>")])
    )
    assert rows_of(texts) == [ids("<s> a </s>"), ids("upon a </s>")]
