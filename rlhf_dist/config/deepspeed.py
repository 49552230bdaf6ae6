"""A user's raw DeepSpeed JSON, with its `auto` values filled and its conflicts refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_dist.config.engines import Dtype
from rlhf_dist.config.errors import UserError

OURS = {"optimizer": "*.optim", "scheduler": "*.optim.schedule"}


def resolve_deepspeed(path: str, *, dtype: Dtype, clip_norm: float, trains: bool) -> dict[str, Any]:
    """Reads the JSON and completes it for one engine.

    Args:
        path: the file; empty means ZeRO stage 0.
        dtype: the precision from our config; the JSON may say `auto` or agree.
        clip_norm: gradient clip from our config, 0 for none.
        trains: False for engines that only run forward; below stage 3 nothing of theirs is sharded, so they get stage 0.

    A trained engine in bf16 or fp16 gets at least stage 1: DeepSpeed's unsharded half-precision optimizer takes other steps
    than stages 1 to 3 do (seen: the gradient norm after one step differs by 10 %), while stage 1 holds the same state or less.

    Raises:
        UserError: unreadable file, an `optimizer` or `scheduler` section, or a value that contradicts our config.
    """
    config = _read(path) if path else {}
    for key, home in OURS.items():
        if key in config:
            raise UserError(f"the DeepSpeed file sets {key!r}", where=path, fix=f"remove it and set {home} in the config")
    wanted: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": clip_norm}
    for key, value in wanted.items():
        _fill(config, key, value, path)
    if config.pop("train_batch_size", "auto") != "auto":
        raise UserError(
            "the DeepSpeed file fixes train_batch_size", where=path, fix="set it to auto: minibatches follow algorithm.minibatches"
        )
    for name, ours in (("bf16", "bf16"), ("fp16", "fp16")):
        section = config.setdefault(name, {})
        _fill(section, "enabled", dtype == ours, f"{path}, {name}")
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    if not trains:
        config["zero_optimization"] = _inference_zero(zero)
    elif zero["stage"] == 0 and dtype != "fp32":
        zero["stage"] = 1
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", 2**31 - 1)
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a resolved DeepSpeed config."""
    return int(config["zero_optimization"]["stage"])


def _inference_zero(zero: dict[str, Any]) -> dict[str, Any]:
    if zero["stage"] < 3:
        return {"stage": 0}
    return {key: value for key, value in zero.items() if key != "offload_optimizer"}


def _fill(section: dict[str, Any], key: str, value: Any, where: str) -> None:
    given = section.get(key, "auto")
    if given != "auto" and given != value:
        raise UserError(f"the DeepSpeed file says {key} = {given!r}, the config says {value!r}", where=where, fix=f'set "{key}": "auto"')
    section[key] = value


def _read(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the DeepSpeed file: {error.strerror}", where=path, fix="see configs/deepspeed/ for files that work"
        ) from None
    except ValueError as error:
        raise UserError(f"the DeepSpeed file is not JSON: {error}", where=path, fix="mend the syntax") from None
    if not isinstance(config, dict):
        raise UserError("the DeepSpeed file must hold an object", where=path, fix="see configs/deepspeed/ for files that work")
    return config
