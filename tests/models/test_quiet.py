from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

from rlhf_dist.models.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
from rlhf_dist.models.quiet import quiet_libraries
quiet_libraries()
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=1)
"""


def test_only_errors_are_left(tiny_model: Path) -> None:
    """A value head that starts anew is reported by transformers as weights that are missing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    done = subprocess.run([sys.executable, "-c", CODE, str(tiny_model)], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_what_a_cpu_lacks_is_not_said_while_modules_are_imported() -> None:
    """bitsandbytes speaks where the CPU has AVX512-BF16, deepspeed where there is no GPU."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_")} | {"PYTHONPATH": str(ROOT)}
    code = "from rlhf_dist.models.quiet import quiet_libraries\nquiet_libraries()\nimport rlhf_dist.engines.consolidation"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_who_asks_for_notices_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    silenced: list[str] = []
    for name in ("set_verbosity_error", "disable_progress_bar"):
        monkeypatch.setattr(logging, name, lambda name=name: silenced.append(name))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    quiet_libraries()
    assert silenced == []
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
    quiet_libraries()
    assert silenced == ["set_verbosity_error", "disable_progress_bar"]
