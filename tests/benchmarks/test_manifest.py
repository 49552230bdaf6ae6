"""Manifests: like is compared with like, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from manifest import Spread, change_suffix, check_alike, manifest, spread, write

WORK = {"rows": 32, "dtype": "float32"}


@pytest.mark.parametrize(
    "change",
    [{"workload": WORK | {"rows": 16}}, {"machine": "another"}, {"threads": 4}, {"device": "cuda:0"}, {"torch": "2.0"}, {"warm_up": 0}],
)
def test_unlike_manifests_are_refused(change: dict[str, Any]) -> None:
    ours = manifest("ours", WORK, threads=2, device="cpu", warm_up=1, repeats=5)
    with pytest.raises(ValueError, match=f"ours and theirs cannot be compared: {next(iter(change))} is"):
        check_alike(ours, dataclasses.replace(ours, side="theirs", **change))


def test_other_packages_and_more_repeats_may_be_compared() -> None:
    ours = manifest("ours", WORK, threads=2, device="cpu", warm_up=1, repeats=5)
    check_alike(
        ours, dataclasses.replace(ours, side="theirs", repeats=9, versions=ours.versions | {"transformers": "5.0"}, settings={"slots": 8})
    )


def test_a_manifest_names_the_versions_and_the_machine() -> None:
    import torch

    facts = manifest("ours", WORK, threads=2, device="cpu")
    assert facts.torch == facts.versions["torch"] == torch.__version__.split("+")[0] or facts.torch == torch.__version__
    assert {"python", "transformers", "deepspeed", "ray", "peft"} <= set(facts.versions)
    assert facts.machine.endswith("cores")


def test_a_spread_is_median_lowest_and_highest() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert spread([3.0, 1.0, 2.0]).text(1) == "2.0 (1.0 to 3.0)"
    assert spread([0.5]).text() == "0.50"


def test_a_report_is_kept_as_json(tmp_path: Path) -> None:
    path = write("name", {"ratio": 2.5}, tmp_path / "results")
    assert path == tmp_path / "results" / "name.json"
    assert json.loads(path.read_text()) == {"ratio": 2.5}


def test_changes_stand_in_the_name_of_a_report() -> None:
    assert change_suffix([]) == ""
    assert change_suffix(["policy.packing=true", "data.train=/a b/c"]) == "_policy.packing=true_data.train=-a-b-c"
    many = [f"policy.optim.lr=1e-{number}" for number in range(20)]
    assert len(change_suffix(many)) < 40 and change_suffix(many) != change_suffix(many[::-1])
