"""The files of a checkpoint, ours or DeepSpeed's, put together are the weights that the engine exports, bit for bit; what is none is
refused unread."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_dist.config.errors import UserError
from rlhf_dist.engines.consolidation import consolidate, read_shards
from rlhf_dist.models.saving import save_model

PROGRAM = Path(__file__).parents[1] / "distributed" / "programs" / "adapters.py"
STAGES = {"full": range(4), "qlora": range(4), "lora": (0, 2), "value": (0, 3), "reward": (0, 3)}
CASES = [f"{kind}_fp32_zero{stage}" for kind, stages in STAGES.items() for stage in stages]
HALF = ["full_bf16_zero2", "qlora_bf16_zero3"]
DEEPSPEEDS = [*(f"full_fp32_zero{stage}" for stage in range(4)), "full_bf16_zero2", "lora_fp32_zero2", "qlora_fp32_zero0"]
TOKENS = torch.arange(4, 12)[None]


@pytest.fixture(scope="module")
def runs(run_ranks: Any, wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, list[float]]]]:
    """By number of ranks: the folder of checkpoints and exports, and the gradient norms."""
    found = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        found[ranks] = (out, run_ranks(PROGRAM, ranks, str(wide_model), str(out))[0])
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES + HALF)
def test_a_checkpoint_of_two_ranks_is_what_the_engine_exports(case: str, runs: Any) -> None:
    folder, _ = runs[2]
    want, got = torch.load(folder / f"{case}.pt"), consolidate(folder / case).weights
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype for name in want)


@pytest.mark.distributed
@pytest.mark.parametrize("case", DEEPSPEEDS)
def test_deepspeeds_own_checkpoint_is_too(case: str, runs: Any) -> None:
    folder, _ = runs[2]
    want, got = torch.load(folder / f"{case}.pt"), consolidate(folder / "deepspeed" / case).weights
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype for name in want)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_at_any_stage_train_as_one_does(case: str, runs: Any) -> None:
    """Gradient norms of three steps, and the weights after them, against one rank at ZeRO 0."""
    first = f"{case[:-1]}0"
    (one, alone), (two, together) = runs[1], runs[2]
    assert together[case][0] == pytest.approx(alone[first][0], rel=1e-5)
    assert together[case] == pytest.approx(alone[first], rel=1e-3)  # Adam's first steps turn rounding of small gradients into whole ones
    got, want = torch.load(two / f"{case}.pt"), torch.load(one / f"{first}.pt")
    assert all(torch.allclose(got[name], want[name], rtol=1e-3, atol=1e-3) for name in want)


@pytest.mark.distributed
def test_training_over_4_bits_lowers_the_loss_and_moves_only_adapters(runs: Any, wide_model: Path) -> None:
    folder, _ = runs[2]
    untrained = AutoModelForCausalLM.from_pretrained(wide_model)
    whole = consolidate(folder / "qlora_fp32_zero3")
    assert whole.base == str(wide_model)
    assert torch.equal(whole.weights["lm_head.weight"], untrained.lm_head.weight)
    assert not torch.equal(whole.weights["model.layers.0.mlp.up_proj.weight"], untrained.model.layers[0].mlp.up_proj.weight)


@pytest.mark.distributed
def test_a_row_that_training_added_for_the_pad_is_there(runs: Any, wide_model: Path) -> None:
    whole = consolidate(runs[2][0] / "reward_fp32_zero3")
    rows, before = whole.weights["model.embed_tokens.weight"], AutoModelForCausalLM.from_pretrained(wide_model).model.embed_tokens.weight
    assert len(rows) == 65 == whole.model.config.vocab_size and whole.model.config.pad_token_id == 64
    assert float((rows[:64] - before).abs().max()) > 0.001 and not rows[64].any(), "the embeddings were trained, and no text held the pad"


@pytest.fixture
def checkpoint(runs: Any, tmp_path: Path) -> Any:
    """`checkpoint(case)`: a copy to change."""
    return lambda case: Path(shutil.copytree(runs[2][0] / case, tmp_path / case))


@pytest.fixture
def shards(runs: Any, tmp_path: Path) -> Any:
    """`shards(case)`: a copy of DeepSpeed's own checkpoint to change."""
    return lambda case: Path(shutil.copytree(runs[2][0] / "deepspeed" / case, tmp_path / "deepspeed" / case))


@pytest.mark.distributed
def test_an_ordinary_checkpoint_is_found_by_its_latest_file(shards: Any, runs: Any, wide_model: Path) -> None:
    """As other programs write it: a tag of their own, no word about the model."""
    folder = shards("full_fp32_zero3")
    (folder / "engine").rename(folder / "global_step3")
    (folder / "latest").write_text("global_step3")
    for name in ("origin.json", "config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="does not say which model") as caught:
        consolidate(folder)
    assert "--base" in caught.value.fix
    got, want = consolidate(folder, str(wide_model)).weights, torch.load(runs[2][0] / "full_fp32_zero3.pt")
    assert all(torch.equal(got[name], want[name]) for name in want)
    adapters = shards("lora_fp32_zero2")
    (adapters / "origin.json").unlink()
    with pytest.raises(UserError, match="adapters of another program"):
        consolidate(adapters, str(wide_model))


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["lora_fp32_zero0", "full_fp32_zero2"])
def test_a_base_that_has_moved_can_be_named(case: str, checkpoint: Any, wide_model: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = checkpoint(case)
    origin = json.loads((folder / "origin.json").read_text())
    (folder / "origin.json").write_text(json.dumps(origin | {"base": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="the model that was trained cannot be found") as caught:
        consolidate(folder)
    assert "--base" in caught.value.fix
    assert consolidate(folder, str(wide_model)).weights["lm_head.weight"].shape == (64, 64)
    if case.startswith("lora"):
        with pytest.raises(UserError, match="the adapter was made for another base model"):
            consolidate(folder, str(tiny_model))


@pytest.mark.distributed
def test_stop_tokens_come_from_the_base(checkpoint: Any, wide_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(wide_model, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    for case in ("full_fp32_zero1", "lora_fp32_zero2"):
        whole = consolidate(checkpoint(case), str(base))
        save_model(whole.model, whole.weights, tmp_path / "out" / case)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / case)
        assert loaded.generation_config.eos_token_id == [2, 7] and loaded.config.use_cache is True
        assert torch.equal(loaded.lm_head.weight, whole.weights["lm_head.weight"])


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["full_fp32_zero0", "full_fp32_zero1", "full_fp32_zero3"])
def test_files_that_would_run_code_are_refused_unread(case: str, shards: Any, tmp_path: Path) -> None:
    folder = shards(case)
    for path in (folder / "engine").glob("*model_states.pt"):
        torch.save({"module": {}, "buffer_names": Trap(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match="hold more than data"):
        read_shards(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "lost"),
    [("full_fp32_zero2", "*rank_1*optim*"), ("full_fp32_zero3", "*rank_0*model*"), ("full_fp32_zero0", "*model_states.pt")],
)
def test_a_missing_shard_is_no_smaller_model(case: str, lost: str, shards: Any) -> None:
    folder = shards(case)
    for path in list((folder / "engine").glob(lost)):
        path.unlink()
    with pytest.raises(UserError, match="not complete") as caught:
        consolidate(folder)
    assert caught.value.where == str(folder / "engine")


@pytest.mark.distributed
def test_a_missing_file_of_ours_is_no_smaller_model_either(checkpoint: Any) -> None:
    folder = checkpoint("full_fp32_zero2")
    (folder / "rank_00001.safetensors").unlink()
    with pytest.raises(UserError, match="a file of the checkpoint is missing") as caught:
        consolidate(folder)
    assert caught.value.where == str(folder / "rank_00001.safetensors")


@pytest.mark.distributed
def test_a_checkpoint_of_another_model_is_refused(checkpoint: Any, tiny_model: Path) -> None:
    folder = checkpoint("full_fp32_zero1")
    shutil.copy(tiny_model / "config.json", folder)
    with pytest.raises(UserError, match=r"\d+ of 21 weights of the model are not in the checkpoint"):
        consolidate(folder)
