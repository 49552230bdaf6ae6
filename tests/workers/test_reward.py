"""One rank of the rewards: functions and models side by side, each rank its rows, faults never numbers."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rlhf_dist.config.errors import UserError
from rlhf_dist.engines.process import Rank
from rlhf_dist.workers.reward import RewardWorker


@pytest.fixture
def classifier(tiny_model: Path, tmp_path: Path) -> Path:
    """A random classifier that shares the policy's tokenizer."""
    torch.manual_seed(4)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=1, pad_token_id=0, initializer_range=0.5, **size)).save_pretrained(
        tmp_path / "rm"
    )
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def sources(*given: dict[str, Any]) -> dict[str, Any]:
    return {"reward.sources": list(given)}


def function(path: Path, name: str) -> dict[str, Any]:
    return {"name": name, "kind": "function", "path": f"{path}:{name}"}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_reward_scores_on_its_own_engine_beside_a_function(
    stage, packing, configured, zero, classifier, reward_file, plain_rank, shard_of, ragged
) -> None:
    changes = sources({"name": "quality", "kind": "model", "model": str(classifier)}, function(reward_file, "even"))
    worker = RewardWorker(
        configured(changes | {"reward.deepspeed": zero(stage), "reward.microbatch_tokens": 20, "reward.packing": packing}), plain_rank
    )
    shard = shard_of(ragged, completions=("w2 w3 w4", "w1", "", "w2", "w2 w2", "w1 w1", "x"))
    info = worker.judge(shard)
    model = LlamaForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        want = [model(input_ids=torch.tensor([prompt + response])).logits.item() for prompt, response in ragged]
    assert [result.name for result in info.results] == ["quality", "even"]  # the order of the config: engines meet in it on all ranks
    assert info.results[0].values == pytest.approx(want, abs=1e-5)
    assert info.results[1].values == pytest.approx([0.5, 0, 0, 0.5, 2 / 3, 0, 0])
    assert info.rows == tuple(range(7)) and info.seconds > 0 and info.tally.means()["rewards/quality_truncated"] == 0.0


def test_functions_see_prompts_completions_and_columns_of_their_rows(configured, plain_rank, shard_of, ragged, tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import json, pathlib\n"
        "def keep(prompts, completions, **columns):\n"
        "    pathlib.Path(__file__).with_suffix('.json').write_text(json.dumps([prompts, completions, columns]))\n"
        "    return [1.0] * len(prompts)\n"
    )
    worker = RewardWorker(configured(sources(function(path, "keep"))), plain_rank)
    worker._rank = Rank(1, 3, 0, "cpu")
    info = worker.judge(shard_of(ragged, columns={"answer": tuple("abcdefg")}))
    assert info.rows == (1, 4) and info.results[0].values == (1.0, 1.0)
    seen = json.loads(path.with_suffix(".json").read_text())
    assert seen == [["prompt 1", "prompt 4"], ["completion 1", "completion 4"], {"answer": ["b", "e"]}]


def test_failed_rows_of_a_rank_are_quarantined_with_their_own_numbers(configured, plain_rank, shard_of, ragged, tmp_path) -> None:
    path = tmp_path / "picky.py"
    path.write_text("def picky(completions): return [1.0 if text.endswith('1') else float('nan') for text in completions]")
    worker = RewardWorker(configured(sources(function(path, "picky") | {"on_failure": "drop_group"})), plain_rank)
    worker._rank = Rank(1, 3, 0, "cpu")
    worker.quarantine_to(str(tmp_path / "quarantine.jsonl"))
    (result,) = worker.judge(shard_of(ragged), "eval", 9).results
    assert (result.values, result.failed) == ((1.0, None), (1,))
    (line,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (line["prompt_id"], line["completion"], line["rank"], line["stream"], line["step"]) == (4, "completion 4", 1, "eval", 9)


def test_a_worker_takes_its_functions_processes_along(configured, reward_file, plain_rank) -> None:
    worker = RewardWorker(configured(sources(function(reward_file, "even"))), plain_rank)
    process = worker._rewards[0]._source._process._child  # type: ignore[union-attr]
    del worker
    gc.collect()
    assert process.returncode == -9


def test_a_rank_without_rows_calls_no_function_and_still_meets_the_models(
    configured, classifier, reward_file, plain_rank, shard_of
) -> None:
    changes = sources({"name": "quality", "kind": "model", "model": str(classifier)}, function(reward_file, "text"))
    worker = RewardWorker(configured(changes), plain_rank)
    worker._rank = Rank(1, 2, 0, "cpu")
    info = worker.judge(shard_of([([5], [6])]))
    assert info.rows == () and [(r.name, r.values) for r in info.results] == [("quality", ()), ("text", ())]


@pytest.mark.parametrize(("name", "said"), [("text", "not a|returned"), ("nan", "nan"), ("short", "1 values for 7")])
def test_a_function_that_fails_stops_the_run(name, said, configured, reward_file, plain_rank, shard_of, ragged) -> None:
    worker = RewardWorker(configured(sources(function(reward_file, name))), plain_rank)
    with pytest.raises(UserError, match=said):
        worker.judge(shard_of(ragged))


def test_abstention_is_none(configured, reward_file, plain_rank, shard_of, ragged) -> None:
    worker = RewardWorker(configured(sources(function(reward_file, "abstains"))), plain_rank)
    assert worker.judge(shard_of(ragged)).results[0].values == (None,) * 7


def test_a_language_model_is_no_reward_model(configured, tiny_model, plain_rank) -> None:
    changes = sources({"name": "quality", "kind": "model", "model": str(tiny_model)})
    with pytest.raises(UserError, match="not a trained sequence classifier"):
        RewardWorker(configured(changes), plain_rank)


def test_a_limit_beyond_the_models_context_is_refused(configured, classifier, plain_rank) -> None:
    changes = sources({"name": "quality", "kind": "model", "model": str(classifier), "max_tokens": 65})
    with pytest.raises(UserError, match="context is 64"):
        RewardWorker(configured(changes), plain_rank)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_reward_model_in_4_bits_scores_nearly_as_the_whole_one(
    stage, configured, zero, plain_rank, shard_of, ragged, wide_model, tmp_path
) -> None:
    config = AutoConfig.from_pretrained(wide_model)
    config.num_labels = 1
    torch.manual_seed(4)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(wide_model).save_pretrained(tmp_path / "rm")
    shard = shard_of(ragged, completions=("w2",) * 7)
    scores = []
    for quantize in ("none", "nf4"):
        changes = sources({"name": "quality", "kind": "model", "model": str(tmp_path / "rm")})
        worker = RewardWorker(configured(changes | {"reward.quantize": quantize, "reward.deepspeed": zero(stage)}), plain_rank)
        scores.append(torch.tensor(worker.judge(shard).results[0].values))
    gap = (scores[0] - scores[1]).std() / scores[0].std()
    assert 0 < float(gap) < 0.7 and float(torch.corrcoef(torch.stack(scores))[0, 1]) > 0.7
