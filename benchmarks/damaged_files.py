"""The kinds of files that `fuzz.py` damages: whole examples of each, how the program reads them, and how another reader does."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import torch
import yaml
from judging import BadData, as_floats, judge_config, judge_data, judge_fragments, judge_newest, judge_rollouts, leaves, same_json
from mutations import damaged_bytes, damaged_values

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.roles import RolloutInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines.state_files import (
    BUFFERS,
    INDEX,
    Index,
    Piece,
    rank_file,
    write_buffers,
    write_index,
    write_pieces,
)
from rlhf_dist.engines.state_files import (
    KINDS as MOMENTS,
)
from rlhf_dist.runs.checkpoints import MANIFEST, CheckpointStore
from rlhf_dist.runs.lineage import CONFIG, check_same_run
from rlhf_dist.runs.rollout_state import write_shard
from rlhf_dist.runs.state import RunState

CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "I."}]
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"tell {n} „it“", "topic": n, "weight": 0.5 + n} for n in range(8)],
    "demonstrations": [{"prompt": f"q {n}", "completion": f'a, "{n}"\nb', "source": "here"} for n in range(8)],
    "messages": [{"messages": [*CHAT, {"role": "user", "content": f"and {n}?"}, CHAT[1]]} for n in range(6)],
    "pairs": [{"prompt": f"q {n}", "chosen": f"good {n}", "rejected": f"bad {n}", "margin": n / 4} for n in range(8)],
    "chats": [{"chosen": [*CHAT[:1], {"role": "assistant", "content": f"{n}"}], "rejected": CHAT} for n in range(6)],
    "transcripts": [{"chosen": f"\n\nHuman: q\n\nAssistant: {n}", "rejected": "\n\nHuman: q\n\nAssistant: no"} for n in range(6)],
    "rankings": [{"prompt": f"q {n}", "answers": ["a", "b", "c"], "scores": [1.5, n + 2.0, 0.25]} for n in range(6)],
    "labelled": [{"prompt": f"q {n}", "response_a": "one", "response_b": "two", "label": "ab"[n % 2]} for n in range(8)],
}
FLAT = ("prompts", "demonstrations", "pairs", "transcripts", "labelled")
DATA = ("jsonl", "jsonl.gz", "csv", "csv.gz", "parquet", "arrow", "feather")
STAGES: dict[str, dict[str, Any]] = {
    "ppo": {
        "run": {"name": "p", "steps": 4, "seed": 1},
        "data": {"train": ["a.jsonl", "b.jsonl"], "eval_fraction": 0.1, "max_prompt_tokens": 32},
        "policy": {"model": "m", "ranks": 2, "optim": {"lr": 1e-5}, "lora": {"r": 8}},
        "value": {"model": "v"},
        "reward": {
            "sources": [
                {"kind": "function", "name": "f", "path": "r.py:f", "weight": 0.5},
                {"kind": "http", "name": "h", "url": "http://127.0.0.1:1/s", "auth_env": "TOKEN", "timeout_s": 2.5},
            ]
        },
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 16},
        "algorithm": {"epochs": 2, "minibatches": 2, "kl": {"coef": 0.1}},
    },
    "sft": {"run": {"name": "s"}, "data": {"train": "d.jsonl", "max_tokens": 64}, "model": {"model": "m", "optim": {"lr": 1e-4}}},
    "reward": {"run": {"name": "r"}, "data": {"train": "d.jsonl", "max_tokens": 64}, "model": {"model": "m", "ranks": 2}},
    "dpo": {"run": {"name": "d"}, "data": {"train": "d.jsonl", "max_tokens": 64}, "model": {"model": "m"}, "dpo": {"beta": 0.2}},
}


class Cases:
    """Makes and judges cases; a seed, a kind and a number give the same case again."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz")
        self._root = Path(self._folder.name)
        self._checkpoint = self._root / "whole" / "checkpoints"
        _write_checkpoints(self._checkpoint)
        self._bomb = gzip.compress(b"x" * 2**24) * 64

    def judge(self, kind: str, number: int) -> tuple[str, str]:
        """What became of a case, and the error."""
        draw, folder = random.Random(f"{self._seed} {kind} {number}"), self._root / "case"
        folder.mkdir()
        try:
            return KINDS[kind](self, draw, folder), ""
        except UserError as error:
            said = str(error)
            return ("TRACEBACK" if said.encode(errors="replace").decode() != said else "refused"), ascii(said)[
                :300
            ]  # what cannot be printed is none
        except BadData as error:
            return "BAD DATA ACCEPTED", str(error)[:2000]
        except BaseException:
            return "TRACEBACK", traceback.format_exc()[-2000:]
        finally:
            shutil.rmtree(folder)

    def data(self, draw: random.Random, folder: Path, ending: str) -> str:
        """A data file of a layout drawn."""
        layout = draw.choice(FLAT if ending.startswith("csv") else tuple(LAYOUTS))
        rows, path = LAYOUTS[layout], folder / f"rows.{ending}"
        if draw.random() < 0.4:
            rows = damaged_values(rows, draw)
        if draw.random() < 0.1:
            rows = rows + LAYOUTS[draw.choice(tuple(LAYOUTS))]
        try:
            content = _encoded(rows, ending.removesuffix(".gz"))
        except (ValueError, TypeError, OverflowError, AttributeError, pa.ArrowException, UnicodeError):
            content = _encoded(LAYOUTS[layout], ending.removesuffix(".gz"))  # this format cannot hold such values
        if ending.endswith(".gz"):
            content = gzip.compress(damaged_bytes(content, draw) if draw.random() < 0.3 else content)
            if draw.random() < 0.005:
                content += self._bomb
        path.write_bytes(damaged_bytes(content, draw) if rows is LAYOUTS[layout] or draw.random() < 0.3 else content)
        return judge_data(path, LAYOUTS[layout])

    def config_text(self, draw: random.Random, folder: Path) -> str:
        """A YAML file with its text damaged."""
        stage = draw.choice(tuple(STAGES))
        text = yaml.safe_dump(STAGES[stage], sort_keys=False, default_flow_style=draw.choice((None, False, True)))
        return judge_config(folder, damaged_bytes(text.encode(), draw), stage, STAGES[stage])

    def config_values(self, draw: random.Random, folder: Path) -> str:
        """A YAML file with other values."""
        stage = draw.choice(tuple(STAGES))
        try:
            text = yaml.safe_dump(damaged_values(STAGES[stage], draw), sort_keys=False)
        except ValueError:  # a whole number of thousands of digits
            text = yaml.safe_dump(STAGES[stage])
        return judge_config(folder, text.encode(), stage, STAGES[stage])

    def checkpoint_bytes(self, draw: random.Random, folder: Path) -> str:
        """The newer of two checkpoints with a file damaged, gone, or one too many."""
        shutil.copytree(self._checkpoint, folder / "checkpoints")
        newest = folder / "checkpoints" / "step_000002"
        path = draw.choice(sorted(each for each in newest.rglob("*") if each.is_file()))
        before = path.read_bytes()
        path.write_bytes(damaged_bytes(before, draw))
        if draw.random() < 0.05:
            path.unlink()
        whole = path.is_file() and (path.read_bytes() == before or (path.name == MANIFEST and same_json(path.read_bytes(), before)))
        return judge_newest(folder, whole)

    def checkpoint_manifest(self, draw: random.Random, folder: Path) -> str:
        """The newer of two checkpoints with other values in its manifest, hashed anew."""
        shutil.copytree(self._checkpoint, folder / "checkpoints")
        path = folder / "checkpoints" / "step_000002" / MANIFEST
        before = json.loads(path.read_text())
        values = damaged_values({name: value for name, value in before.items() if name != "sha256"}, draw)
        with contextlib.suppress(ValueError):
            values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
            path.write_text(json.dumps(values))
        found = CheckpointStore(folder / "checkpoints").newest(lambda _: None)
        if found is None:
            raise BadData("neither checkpoint is taken")
        found.verify()
        state = RunState.from_dict(found.state)
        if as_floats(state.to_dict()) != as_floats(found.state):
            raise BadData(f"{state.to_dict()} is made of {found.state}")
        if found.step == 2:
            if {name: list(file) for name, *file in ((f.name, f.bytes, f.sha256) for f in found.files.values())} != values["files"]:
                raise BadData("other files than the manifest names")
            numbers = (state.step, state.policy_version, state.prompt_cursor, state.metrics_bytes, *state.pending.values())
            if min(numbers) < 0:
                raise BadData(f"a count below 0: {numbers}")
        return "equal" if found.step == 2 and values == before else "consistent" if found.step == 2 else "refused"

    def fragments(self, draw: random.Random, folder: Path) -> str:
        """An engine's files, damaged though their hashes agree."""
        shutil.copytree(self._checkpoint / "step_000002" / "policy", folder / "policy")
        path = draw.choice(sorted((folder / "policy").iterdir()))
        before = path.read_bytes()
        if path.name == INDEX and draw.random() < 0.5:
            path.write_text(json.dumps(damaged_values(json.loads(before), draw)))
        elif path.name != INDEX and draw.random() < 0.7:  # the head is where it matters
            size = int.from_bytes(before[:8], "little")
            head = before[8 : 8 + size]
            values = damaged_values(json.loads(head), draw) if draw.random() < 0.5 else None
            head = damaged_bytes(head, draw) if values is None else json.dumps(values).encode()
            path.write_bytes(len(head).to_bytes(8, "little") + head + before[8 + size :])
        else:
            path.write_bytes(damaged_bytes(before, draw))
        return judge_fragments(folder / "policy", path.read_bytes() == before)

    def rollouts(self, draw: random.Random, folder: Path) -> str:
        """Pending rollouts, damaged though their hashes agree."""
        shutil.copytree(self._checkpoint / "step_000002" / "rollouts", folder / "rollouts")
        path = draw.choice(sorted((folder / "rollouts").iterdir()))
        before = path.read_bytes()
        if path.suffix == ".json" and draw.random() < 0.6:
            path.write_text(json.dumps(damaged_values(json.loads(before), draw)))
        else:
            path.write_bytes(damaged_bytes(before, draw))
        return judge_rollouts(folder / "rollouts", path.read_bytes() == before)

    def checkpoint_config(self, draw: random.Random, folder: Path) -> str:
        """The settings in a checkpoint, damaged though their hash agrees."""
        path = folder / CONFIG
        config = PPOConfig.model_validate(STAGES["ppo"])
        before = yaml.safe_dump(config.model_dump(mode="json")).encode()
        if draw.random() < 0.5:
            path.write_bytes(damaged_bytes(before, draw))
        else:
            path.write_text(yaml.safe_dump(damaged_values(yaml.safe_load(before), draw)))
        changed = check_same_run(folder, config)
        theirs = dict(leaves(yaml.safe_load(path.read_bytes().decode())))
        ours = dict(leaves(yaml.safe_load(before)))
        differing = {name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)}
        if len(differing) != len(changed) or not all(any(each.startswith(f"{name}: ") for each in changed) for name in differing):
            raise BadData(f"{differing} differ, {changed} are said to")
        return "consistent" if changed else "equal"


Judge = Callable[[Cases, random.Random, Path], str]


def _of(ending: str) -> Judge:
    return lambda cases, draw, folder: cases.data(draw, folder, ending)


KINDS: dict[str, Judge] = {ending: _of(ending) for ending in DATA} | {
    "config text": Cases.config_text,
    "config values": Cases.config_values,
    "checkpoint files": Cases.checkpoint_bytes,
    "checkpoint manifest": Cases.checkpoint_manifest,
    "engine files": Cases.fragments,
    "pending rollouts": Cases.rollouts,
    "checkpoint config": Cases.checkpoint_config,
}


def _encoded(rows: Any, ending: str) -> bytes:
    if ending == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if ending == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    if ending == "parquet":
        pa.parquet.write_table(table, sink, row_group_size=3)
        return bytes(sink.getvalue())
    with (pa.ipc.new_stream if ending == "arrow" else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return bytes(sink.getvalue())


def _write_checkpoints(root: Path) -> None:
    """Two committed ones, with all kinds of files."""
    store = CheckpointStore(root)
    torch.manual_seed(0)
    for step in (1, 2):
        folder = store.begin(step)
        (folder / "policy").mkdir()
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (6, 4), "norm.weight": (4,)}
        tensors = {name: {kind: torch.randn(math.prod(shape)) for kind in MOMENTS} for name, shape in shapes.items()}
        pieces = [
            Piece(name, start, 3.0, {kind: flat[start:stop].clone() for kind, flat in tensors[name].items()}) for name, start, stop in _CUTS
        ]
        write_pieces(folder / "policy" / rank_file(0), pieces[:2])
        write_pieces(folder / "policy" / rank_file(1), pieces[2:])
        index = Index(
            format=1, world_size=2, files=2, stage=2, dtype="float32", parameters=shapes, steps_taken=3, global_steps=3, skipped_steps=0
        )
        write_index(folder / "policy" / INDEX, index)
        write_buffers(folder / "policy" / BUFFERS, {"inv_freq": torch.randn(2)})
        write_shard(folder / "rollouts", 0, *_shard())
        (folder / CONFIG).write_text(yaml.safe_dump(STAGES["ppo"]))
        store.commit(
            step, RunState(step=step, policy_version=step, prompt_cursor=8, kl_coef=0.1, pending={"3": 1}, dropped={"x": 1}).to_dict()
        )


_CUTS = (("embed.weight", 0, 10), ("norm.weight", 0, 4), ("embed.weight", 10, 24))


def _shard() -> tuple[ExperienceBatch, RolloutInfo]:
    rows, prompt, response = 3, 2, 4
    mask_BT = torch.arange(response)[None] < torch.tensor([[4], [2], [3]])
    ids_B = torch.arange(rows)
    batch = ExperienceBatch(
        torch.ones(rows, prompt, dtype=torch.long), torch.ones(rows, prompt, dtype=torch.bool),
        torch.ones(rows, response, dtype=torch.long), mask_BT, mask_BT,
        ids_B, ids_B, torch.zeros_like(ids_B), torch.full((rows,), 2), torch.randn(rows, response),
        ("a", "b", "c"), ("x", "y", "z"), {"answer": (1, "two", None)},
    )  # fmt: skip
    numbers = tuple(range(rows))
    return batch, RolloutInfo(numbers, numbers, (2, 2, 2), (4, 2, 3), (2, 2, 2), (0, 0, 0), 0.5, Tally({"a": 1.0}, {"a": 2.0}, {"b": 0.5}))
