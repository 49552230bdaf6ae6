"""What the benchmarks work on: lengths as announced, exact doublings, FLOPs of the real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workload import (
    LONGEST_PROMPT,
    Rounds,
    Shape,
    experience,
    make_rows,
    sampled,
    save_models,
    twice_the_batch,
    twice_the_length,
    write_job,
)

TINY = Shape(hidden=64, layers=2, vocabulary=100)


def test_ragged_lengths_have_a_third_of_the_limit_on_average_and_full_ones_all_of_it() -> None:
    ragged = make_rows(512, 300).lengths
    assert 85 < sum(ragged) / len(ragged) < 105  # clipping takes a little off the mean of 100
    assert min(ragged) >= 2 and max(ragged) == 300
    assert set(make_rows(4, 300, ragged=False).lengths) == {300}


def test_the_same_numbers_give_the_same_work() -> None:
    assert make_rows(8, 40) == make_rows(8, 40)
    assert all(prompt[0] == 1 and 8 <= len(prompt) <= LONGEST_PROMPT for prompt in make_rows(64, 40).prompts)


def test_doublings_are_exact() -> None:
    rows = make_rows(5, 40, vocabulary=100)
    more, longer = twice_the_batch(rows, 100), twice_the_length(rows, 100)
    assert more.prompt_lengths == rows.prompt_lengths * 2 and more.lengths == rows.lengths * 2
    assert len(set(more.prompts)) == 10
    assert longer.prompt_lengths == tuple(2 * length for length in rows.prompt_lengths)
    assert longer.lengths == tuple(2 * length for length in rows.lengths)
    assert max(max(prompt) for prompt in more.prompts + longer.prompts) < 100


def test_the_flops_of_a_shape_are_those_of_its_weights() -> None:
    # A layer: four projections of 64 × 64, three of 64 × 128, two norms of 64; a last norm; a head of 64 × 100, tied to the embeddings.
    model = sampled(TINY)
    assert model.flops.linear == 2 * (2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64)
    assert model.flops.attention == 2 * 2 * 64
    assert model.flops.head == 2 * 64 * 100
    assert model.kv_numbers == 2 * 2 * 64


def test_experience_has_the_lengths_of_its_rows() -> None:
    rows = make_rows(6, 30, vocabulary=100)
    batch = experience(rows, 100)
    assert tuple(batch.prompt_lengths_B.tolist()) == rows.prompt_lengths
    assert tuple(batch.response_lengths_B.tolist()) == rows.lengths
    assert batch.select([2]).prompt_tokens_BP.tolist() == [list(rows.prompts[2])]


def test_the_tokenizer_gives_back_the_tokens_of_a_prompt(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    models, rows = save_models(tmp_path, TINY), make_rows(3, 10, vocabulary=100)
    job = json.loads(
        write_job(tmp_path / "run", models, {"dtype": "float32", "minibatches": 1}, rows, rounds=Rounds(1, 1), threads=1).read_text()
    )
    text = " ".join(f"t{token}" for token in job["prompts"][0][1:])
    assert AutoTokenizer.from_pretrained(models[0])(text)["input_ids"] == job["prompts"][0]
    assert job["workload"]["tokens"] == sum(rows.lengths) and job["iterations"] == 2 == job["repeats"] + job["warm_up"]


@pytest.mark.parametrize("name", ["policy", "scorer"])
def test_the_saved_models_have_the_shape(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    save_models(tmp_path, TINY)
    config = AutoConfig.from_pretrained(tmp_path / name)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, 100)
