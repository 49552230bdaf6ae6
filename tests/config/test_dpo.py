"""The DPO config, read as the command line reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config, load_config

GIVEN = ("data.train=a.jsonl", "model.model=m")


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    config = load_config(DPOConfig, None, GIVEN)
    dpo = config.dpo
    assert (config.run.name, config.reference.model, dpo.loss, dpo.beta, dpo.label_smoothing) == ("dpo", "", "sigmoid", 0.1, 0)
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config))
    assert load_config(DPOConfig, path) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("dpo.bta=1",), "beta"),
        (("dpo.loss=kto",), "dpo.loss"),
        (("dpo.beta=0",), "dpo.beta"),
        (("dpo.label_smoothing=0.5",), "dpo.label_smoothing"),
        (("dpo.label_smoothing=-0.1",), "dpo.label_smoothing"),
        (("dpo.loss=hinge", "dpo.label_smoothing=0.1"), "loss hinge knows no label_smoothing"),
        (("dpo.loss=ipo", "dpo.label_smoothing=0.1"), "loss ipo knows no label_smoothing"),
        (("dpo.loss=robust",), "loss robust needs the share of wrong labels"),
        (("reference.ranks=2",), "no such key"),
    ],
)
def test_wrong_values_are_named(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(DPOConfig, None, (*GIVEN, *overrides))


@pytest.mark.parametrize("overrides", [("dpo.label_smoothing=0.49",), ("dpo.loss=robust", "dpo.label_smoothing=0.1"), ("dpo.loss=ipo",)])
def test_what_fits_is_taken(overrides: tuple[str, ...]) -> None:
    assert load_config(DPOConfig, None, (*GIVEN, *overrides)).dpo
