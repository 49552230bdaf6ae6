"""The engine contract, told by the smallest engine that keeps it: one linear layer on one rank."""

import dataclasses
import hashlib
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_dist.contracts.engine import Engine, Objective, SavedFile, StepInfo
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.tally import Tally


def batch(tokens):
    """Rows of one prompt token and one response token."""
    column = torch.tensor(tokens)[:, None]
    yes = torch.ones_like(column, dtype=torch.bool)
    return SequenceBatch(column, yes, column, yes, yes)


class ScaleEngine:
    """Predicts w · token."""

    rank, world_size = 0, 1

    def __init__(self):
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.module = torch.nn.ParameterList([self.w])

    def forward(self, microbatches):
        with torch.no_grad():
            return [self._outputs(m) for m in microbatches]

    def forward_backward(self, microbatches, objective, denominator):
        tally = Tally()
        for microbatch in microbatches:
            loss, part = objective(self._outputs(microbatch), microbatch)
            (loss / denominator).backward()
            tally.merge(part)
        return tally

    def optimizer_step(self):
        norm = float(self.w.grad.abs())
        self.w.data -= 0.1 * self.w.grad
        self.w.grad = None
        return StepInfo(grad_norm=norm, lr=0.1)

    def unsound_weights(self):
        return "" if bool(self.w.isfinite()) else "w"

    def any_rank(self, mine):
        return mine

    def export_weights(self, merged: bool = True, bucket_bytes: int = 2**20):
        yield {"w": self.w.data.clone()}

    def begin_save(self, folder):
        save_file({"w": self.w.data.clone()}, folder / "w.safetensors")
        content = (folder / "w.safetensors").read_bytes()
        self.files = (SavedFile("w.safetensors", len(content), hashlib.sha256(content).hexdigest()),)

    def saved(self, wait):
        return self.files

    def load(self, folder):
        self.w.data = load_file(folder / "w.safetensors")["w"]

    def _outputs(self, microbatch):
        return {"values_BT": self.w * microbatch.response_tokens_BT.float()}


def squared_error(outputs, microbatch):
    """Sum of ½(v − 1)²."""
    losses_BT = 0.5 * (outputs["values_BT"] - 1) ** 2
    tally = Tally()
    tally.add("loss", float(losses_BT.detach().sum()), losses_BT.numel())
    return losses_BT.sum(), tally


def methods(protocol):
    return {name: member for name, member in vars(protocol).items() if inspect.isfunction(member) and not name.startswith("_")}


def test_the_contract_is_its_verbs():
    verbs = {
        "forward",
        "forward_backward",
        "optimizer_step",
        "unsound_weights",
        "export_weights",
        "begin_save",
        "saved",
        "load",
        "any_rank",
    }
    assert set(methods(Engine)) == verbs


def test_the_engine_of_this_file_keeps_the_contract():
    for name, member in methods(Engine).items():
        assert list(inspect.signature(getattr(ScaleEngine, name)).parameters) == list(inspect.signature(member).parameters)
    assert list(inspect.signature(Objective.__call__).parameters)[1:] == list(inspect.signature(squared_error).parameters)


@pytest.mark.parametrize("cut", [[[1, 2, 3, 4]], [[1], [2, 3, 4]], [[1], [2], [3], [4]], [[1, 2, 3, 4], []]])
def test_a_global_denominator_makes_the_cut_invisible(cut):
    engine = ScaleEngine()
    tally = engine.forward_backward([batch(rows) for rows in cut], squared_error, denominator=4)
    assert tally.means() == {"loss": 0.5}
    step = engine.optimizer_step()
    assert step == StepInfo(grad_norm=2.5, lr=0.1, skipped=False)  # d/dw of the mean of ½(w·x − 1)² at w = 0 is −mean(x)
    assert engine.w.item() == pytest.approx(0.25)


def test_what_is_saved_loads_again(tmp_path: Path):
    engine, twin = ScaleEngine(), ScaleEngine()
    engine.w.data.fill_(3.0)
    engine.begin_save(tmp_path)
    (file,) = engine.saved(wait=True)
    assert (tmp_path / file.name).stat().st_size == file.bytes and len(file.sha256) == 64
    twin.load(tmp_path)
    assert next(twin.export_weights())["w"] == 3.0
    assert twin.forward([batch([2])])[0]["values_BT"].tolist() == [[6.0]]


def test_a_step_report_is_frozen_and_travels():
    info, file = StepInfo(grad_norm=1.0, lr=1e-6, skipped=True), SavedFile("a", 1, "00")
    assert pickle.loads(pickle.dumps((info, file))) == (info, file)
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.lr = 0.0  # type: ignore[misc]
