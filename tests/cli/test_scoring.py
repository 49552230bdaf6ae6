from __future__ import annotations

import pytest

from rlhf_dist.cli.scoring import answers_of, as_prompt, one_way, settings
from rlhf_dist.config.errors import UserError
from rlhf_dist.data.layouts import Demonstration, Origin, PreferencePair, Ranking

HERE = Origin("x.jsonl", 0, "x")
NAMES = ("--prompt and --completion", "--data and --output")


def test_one_text_or_a_file() -> None:
    assert one_way(("p", "c"), (None, None), NAMES) is True
    assert one_way(("", "c"), (None, None), NAMES) is True  # an empty prompt is one
    assert one_way((None, None), ("d", "o"), NAMES) is False


@pytest.mark.parametrize(
    ("single", "files", "said"),
    [
        (("p", None), (None, None), "only a part"),
        ((None, None), (None, None), "nothing to score"),
        ((None, None), ("d", None), "only a part"),
        (("p", "c"), ("d", None), "exclude each other"),
    ],
)
def test_anything_else_is_refused(single: tuple[object, ...], files: tuple[object, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        one_way(single, files, NAMES)


def test_answers_best_first() -> None:
    assert answers_of(Demonstration("p", "c", HERE)) == ("c",)
    assert answers_of(PreferencePair("p", "c", "r", HERE)) == ("c", "r")
    assert answers_of(Ranking("p", ("x", "y", "z"), (1, 2, 3), HERE)) == ("x", "y", "z")


def test_prompts_and_settings() -> None:
    assert as_prompt("hi", chat=False) == "hi"
    assert as_prompt("hi", chat=True) == [{"role": "user", "content": "hi"}]
    assert settings(["data.max_tokens=9"]).data.max_tokens == 9
    with pytest.raises(UserError, match="did you mean 'dtype'"):
        settings(["model.dtyp=bf16"])
