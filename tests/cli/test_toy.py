"""`rlhf-dist toy` leaves a task that the pipeline can be run on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.cli.main import main


def test_it_writes_corpus_pairs_prompts_tokenizer_and_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["toy", "--output", str(tmp_path), "--seed", "1"])
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("corpus", "pairs")}
    assert len(rows["corpus"]) > 1000 and set(rows["pairs"][0]) == {"prompt", "chosen", "rejected"}
    assert (tmp_path / "prompts.jsonl").is_file() and (tmp_path / "held_out.jsonl").is_file()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer) and model.generation_config.eos_token_id == tokenizer.eos_token_id
    shown = capsys.readouterr().out
    assert f"{model.num_parameters()} parameters" in shown and rows["pairs"][0]["chosen"] in shown


def test_bad_options_end_with_status_2(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["toy", "--output", str(tmp_path), "--seed", "-1"])
    assert ended.value.code == 2
