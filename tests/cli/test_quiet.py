from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
from rlhf_dist.cli.quiet import quiet_libraries
quiet_libraries()
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=1)
"""


@pytest.mark.parametrize("verbosity", [None, "info"])
def test_only_errors_are_left_unless_asked_for(tiny_model: Path, verbosity: str | None) -> None:
    """A value head that starts anew is reported by transformers as weights that are missing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    if verbosity:
        environment["TRANSFORMERS_VERBOSITY"] = verbosity
    done = subprocess.run([sys.executable, "-c", CODE, str(tiny_model)], env=environment, capture_output=True, text=True, check=True)
    assert (done.stderr == "") == (verbosity is None), done.stderr
    assert done.stdout == ""
