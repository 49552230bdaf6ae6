"""The engine contract, told by the smallest engine that keeps it: one linear layer on one rank."""

import dataclasses
import inspect
import pickle
from pathlib import Path

import pytest
import torch

from rlhf_dist.contracts.engine import Engine, Objective, StepInfo
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

    def export_weights(self, merged: bool = True, bucket_bytes: int = 2**20):
        yield {"w": self.w.data.clone()}

    def save(self, folder):
        torch.save(self.w.data, folder / "w.pt")

    def load(self, folder):
        self.w.data = torch.load(folder / "w.pt")

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


def test_the_contract_is_the_five_verbs():
    assert set(methods(Engine)) == {"forward", "forward_backward", "optimizer_step", "export_weights", "save", "load"}


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
    engine.save(tmp_path)
    twin.load(tmp_path)
    assert next(twin.export_weights())["w"] == 3.0
    assert twin.forward([batch([2])])[0]["values_BT"].tolist() == [[6.0]]


def test_a_step_report_is_frozen_and_travels():
    info = StepInfo(grad_norm=1.0, lr=1e-6, skipped=True)
    assert pickle.loads(pickle.dumps(info)) == info
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.lr = 0.0  # type: ignore[misc]
