"""Rows in the rectangle of the field, and in each layout of ours: other slots, the same loss and the same gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import LAYOUTS, LayoutModule, Rectangle, rectangle_inputs
from workload import Shape, experience, make_rows, save_models

from rlhf_dist.algos.objectives import PolicyObjective
from rlhf_dist.config.algorithm import AlgorithmSection

WORDS = 100
ROWS = make_rows(6, 24, vocabulary=WORDS)
WIDE = Rectangle(max(ROWS.prompt_lengths), max(ROWS.lengths))


def gradient(module: LayoutModule, layout: str, parts: tuple[tuple[int, ...], ...]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the PPO objective over all rows, a forward a part."""
    batch, objective, loss = experience(ROWS, WORDS), PolicyObjective(AlgorithmSection()), 0.0
    # Ratios near 1, so that no token is clipped away.
    batch = batch.replace(old_logprobs_BT=torch.full_like(batch.old_logprobs_BT, -4.6))
    module.zero_grad()
    module.lay(layout, WIDE)
    for rows in parts:
        part = batch.select(rows)
        summed, _ = objective(module(**module.inputs(part)), part)
        (summed / sum(ROWS.lengths)).backward()
        loss += summed.item() / sum(ROWS.lengths)
    return loss, torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> LayoutModule:
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("layouts")
    path, _ = save_models(folder, Shape(64, 2, WORDS), scorer=False, tokenizer=False)
    return LayoutModule(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), packing=True)


def test_every_layout_has_the_same_loss_and_gradient(module: LayoutModule) -> None:
    parts: dict[str, tuple[tuple[int, ...], ...]] = {"plain": ((0, 1, 2, 3), (4, 5)), "padded": ((0, 1), (2, 3), (4, 5))}
    found = {layout: gradient(module, layout, parts.get(layout, ((0, 3, 5), (1, 2, 4)))) for layout in LAYOUTS}
    loss, plain = found["plain"]
    assert abs(loss) > 1e-3 and plain.norm() > 1e-3
    for layout, (other, grown) in found.items():
        assert other == pytest.approx(loss, rel=1e-5), layout
        assert (grown - plain).norm() <= 1e-5 * plain.norm(), layout


def test_plain_runs_the_model_and_its_head_on_every_slot_of_the_rectangle(module: LayoutModule) -> None:
    seen: dict[str, Any] = {}
    head = module.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, given, __: seen.update(slots=given[0].shape[:-1].numel()))
    part = experience(ROWS, WORDS).select([0, 1])
    try:
        module.lay("plain", WIDE)
        module(**module.inputs(part))
        assert seen["slots"] == 2 * WIDE.slots
        module.lay("padded", WIDE)
        module(**module.inputs(part))
        assert seen["slots"] == int(part.response_mask_BT.sum())
    finally:
        handle.remove()


def test_a_rectangle_pads_prompts_on_the_left_and_completions_on_the_right() -> None:
    part = experience(ROWS, WORDS).select([1])
    inputs, places_BT = rectangle_inputs(part, Rectangle(60, 30))
    prompt, tokens = list(ROWS.prompts[1]), part.response_tokens_BT[0].tolist()
    assert inputs["input_ids"][0].tolist() == [0] * (60 - len(prompt)) + prompt + tokens + [0] * (30 - len(tokens))
    assert inputs["attention_mask"].sum() == len(prompt) + len(tokens)
    assert inputs["input_ids"][0, places_BT[0]].tolist() == tokens
    assert inputs["position_ids"][0, 60 - len(prompt) :][: len(prompt) + len(tokens)].tolist() == list(range(len(prompt) + len(tokens)))
