"""The split by prompt: nothing crosses, and the share is what was asked for."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data.layouts import Demonstration, Origin, PreferencePair, PromptOnly
from rlhf_dist.data.prompts import held_out
from rlhf_dist.data.splitting import normalised, prompt_text, side, split_key

ORIGIN = Origin("f.jsonl", 0, "s")


@given(st.text(min_size=1), st.sampled_from([" ", "  ", "\n", "\t"]), st.integers(0, 5))
def test_prompts_that_differ_in_space_and_case_stay_together(prompt: str, space: str, seed: int) -> None:
    record = PromptOnly(prompt, ORIGIN)
    again = Demonstration(space + prompt.replace(" ", space * 2) + space, "a", ORIGIN)
    chat = PromptOnly(({"role": "user", "content": prompt},), ORIGIN)
    assert side(record, 0.5, seed) == side(again, 0.5, seed) == side(chat, 0.5, seed)


def test_the_share_is_kept_and_the_seed_cuts_otherwise() -> None:
    records = [PromptOnly(f"prompt {n}", ORIGIN) for n in range(4000)]
    for seed in (0, 1):
        share = sum(side(record, 0.2, seed) == "eval" for record in records) / len(records)
        assert abs(share - 0.2) < 0.025
    assert any(side(record, 0.2, 0) != side(record, 0.2, 1) for record in records)
    assert all((side(record, 0.2) == "eval") == held_out(str(record.prompt), 0.2) for record in records)


def test_dialogues_go_by_all_their_turns() -> None:
    one = PromptOnly(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}), ORIGIN)
    assert split_key(one) == "user: a assistant: b user: c"
    assert prompt_text("as it is ") == "as it is " and prompt_text(({"role": "user", "content": "Hi"},)) == "Hi"


def test_pairs_without_prompt_go_by_their_texts() -> None:
    pairs = [PreferencePair("", f"good {n}", f"bad {n}", ORIGIN) for n in range(50)]
    assert len({side(pair, 0.5) for pair in pairs}) == 2 and split_key(pairs[0]) == "good 0 bad 0"


def test_normalised_folds_width_case_and_space() -> None:
    assert normalised("  Straße \n ＡＢＣ ") == "strasse abc" == json.loads('"strasse abc"')
