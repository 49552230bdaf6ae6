"""What an engine saves at any ZeRO stage is what any engine loads: by one rank and by two, and in what DeepSpeed keeps inside."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from rlhf_dist.config.errors import UserError
from rlhf_dist.engines.fragments import refuse_unsaveable, restore_scaler, scaler_of
from rlhf_dist.engines.state_files import Scaler

PROGRAM = Path(__file__).parents[1] / "distributed" / "programs" / "fragments.py"
FULL = [f"full_fp32_zero{stage}" for stage in range(4)]
HALF = ["full_bf16_zero2", "full_bf16_zero3"]
LORA = ["lora_fp32_zero3"]
CASES = [*FULL, *HALF, *LORA]
ALONE = ["full_fp32_zero0", "full_fp32_zero3", "full_bf16_zero2", "lora_fp32_zero0"]


@pytest.fixture(scope="module")
def claims(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, bool]]]]:
    """By number of ranks, of each rank: what held of each case."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    return {1: run_ranks(PROGRAM, 1, str(one)), 2: run_ranks(PROGRAM, 2, str(two), str(one))}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "case"), [*((1, case) for case in ALONE), *((2, case) for case in CASES)])
def test_saved_loaded_rolled_back_and_skipped_is_exact(ranks: int, case: str, claims: Any) -> None:
    """Resumed and rolled back steps are bit for bit the uninterrupted ones, moments included; an infinite gradient leaves no trace."""
    for rank in claims[ranks]:
        assert [claim for claim, held in rank[case].items() if not held] == []
        wanted = ["loaded is what was saved", "resumed is uninterrupted", "rolled back is uninterrupted", "a skipped step leaves no trace"]
        assert {*wanted, "inf changes nothing", "nan moves the schedule", "training goes on"} <= rank[case].keys()


@pytest.mark.distributed
@pytest.mark.parametrize("target", ["full_fp32_zero0", "full_fp32_zero3", "full_bf16_zero2", "lora_fp32_zero3"])
def test_any_layout_takes_the_checkpoint_of_any_other(target: str, claims: Any) -> None:
    """Weights are equal bit for bit (rounded from the same fp32 where the precision differs), the next step within 1e-6."""
    loaded = [claim for claim in claims[2][0][target] if claim.endswith(" loaded")]
    kind, dtype, _ = target.split("_")
    want = len(FULL + HALF) + 3 if kind == "full" else len(LORA) + 1
    assert len(loaded) == want and len({claim.split("/")[0] for claim in loaded}) == 2
    stepped = [claim for claim in claims[2][0][target] if claim.endswith(" stepped")]
    assert stepped and all(dtype in claim for claim in stepped)
    assert claims[2][0][target]["another model is refused"]


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload to nvme"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload to nvme"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio below 1"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"check_grad_overflow": False}}, "check_grad_overflow"),
    ],
)
def test_what_could_not_be_saved_or_checked_is_refused_at_once(config: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        refuse_unsaveable(config)
    refuse_unsaveable({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}})


def test_a_dynamic_loss_scale_is_taken_out_and_put_back() -> None:
    def optimizer(cur_scale: float) -> Any:
        made = DynamicLossScaler(cur_scale, 1000, 1, delayed_shift=2, consecutive_hysteresis=False, raise_error_at_min_scale=False)
        return SimpleNamespace(loss_scaler=made)

    before, after, static = optimizer(2.0**16), optimizer(2.0**4), SimpleNamespace(loss_scaler=LossScaler(1.0))
    for overflow in (True, True, False):
        before.loss_scaler.update_scale(overflow)
    saved = scaler_of(before)
    assert saved == Scaler(cur_scale=2.0**15, cur_iter=3, last_overflow_iter=1, cur_hysteresis=1)
    restore_scaler(after, saved)
    assert vars(after.loss_scaler) == vars(before.loss_scaler)
    restore_scaler(after, None)  # saved in fp32: what is there begins anew
    restore_scaler(static, saved)
    assert scaler_of(after) == saved and scaler_of(static) is None is scaler_of(torch.optim.AdamW([torch.zeros(1)]))
    assert static.loss_scaler.loss_scale == 1.0
