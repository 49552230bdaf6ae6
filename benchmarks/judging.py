"""What the program makes of a damaged file, held against what other readers say stands in it."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import yaml
from safetensors.numpy import load_file

from rlhf_dist.cli.main import main
from rlhf_dist.config.loading import load_config
from rlhf_dist.data.layouts import Record
from rlhf_dist.data.validation import typed_rows
from rlhf_dist.engines.state_files import (
    BUFFERS,
    INDEX,
    SavedState,
    rank_file,
)
from rlhf_dist.runs.checkpoints import CheckpointStore
from rlhf_dist.runs.rollout_state import read_shard
from rlhf_dist.runs.state import RunState

NULLS = frozenset(
    (
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "n/a",
        "nan",
        "null",
    )
)


class BadData(Exception):
    """Something was accepted that is not what the file says."""


def judge_data(path: Path, original: list[dict[str, Any]]) -> str:
    found = list(typed_rows(str(path)))
    faults = [typed.fault for typed in found if typed.fault]
    for fault in faults:
        str(fault.as_error()).encode()
    try:
        theirs = list(_other_reader(path))
    except Exception as error:
        if len(faults) < len(found):
            raise BadData(f"{len(found) - len(faults)} rows of a file that cannot be read: {error}") from error
        raise
    if len(theirs) != len(found):
        raise BadData(f"{len(found)} rows of {len(theirs)}")
    for typed, row in zip(found, theirs, strict=True):
        if typed.record is not None and (row is None or not _same_row(typed.row, row)):
            raise BadData(f"{typed.row} is not {row}")
        if typed.record is not None:
            _check_record(typed.record, typed.row)
    if faults:
        return "refused"
    return "equal" if [typed.row for typed in found] == original else "consistent"


def _other_reader(path: Path) -> Iterator[Any]:
    """Rows as plain libraries have them; None for a line that is no JSON object."""
    content = path.read_bytes()
    if path.name.endswith(".gz"):
        content = gzip.decompress(content)
    if ".jsonl" in path.name:
        for line in content.removeprefix(b"\xef\xbb\xbf").rstrip(b" \t\r\n\v\f").split(b"\n"):
            yield _json(line)
    elif ".csv" in path.name:
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        names = next(lines)
        yield from ({name: _Cell(cell) for name, cell in zip(names, line, strict=True)} for line in lines if line)
    else:
        source = pa.BufferReader(content)
        if path.suffix == ".parquet":
            table = pa.parquet.ParquetFile(source).read()
        else:
            table = (pa.ipc.open_file if content[:6] == b"ARROW1" else pa.ipc.open_stream)(source).read_all()
        for start in range(table.num_rows):
            row = table.slice(start, 1)
            try:
                yield row.to_pylist()[0]
            except ValueError:
                yield None


class _Cell(str):
    """Of a CSV file: the text, of which a number may be made."""


def _json(line: bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        row = json.loads(line.decode(), object_pairs_hook=once)
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _same_row(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if not any(isinstance(value, _Cell) for value in theirs.values()):
        return repr(ours) == repr(theirs)
    return ours.keys() == theirs.keys() and all(_same_cell(ours[name], str(theirs[name])) for name in ours)


def _same_cell(value: Any, cell: str) -> bool:
    if value is None:
        return cell in NULLS
    if isinstance(value, bool):
        return cell.strip().lower() in (("true", "1") if value else ("false", "0"))
    if isinstance(value, int | float):
        number = float(int(cell, 16)) if cell.strip().lower().startswith(("0x", "-0x")) else float(cell)
        return math.isclose(number, value, rel_tol=1e-15) or number == value
    return bool(value == cell)


def _check_record(record: Record, row: dict[str, Any]) -> None:
    """What a record says must stand in its row, and not a part of it alone."""
    whole = json.dumps(row, ensure_ascii=False, default=str)
    for name in ("completion", "chosen", "rejected", "answers", "prompt"):
        said = getattr(record, name, "")
        texts = said if isinstance(said, tuple) else (said,)
        for text in (each["content"] if isinstance(each, dict) else each for each in texts):
            if json.dumps(text, ensure_ascii=False)[1:-1] not in whole and not isinstance(row.get("prompt"), list) and "input" not in row:
                raise BadData(f"{name} {text!r} does not stand in {row}")


def judge_config(folder: Path, content: bytes, stage: str, original: dict[str, Any]) -> str:
    path = folder / "run.yaml"
    path.write_bytes(content)
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        try:
            main(["config", "show", "--config", str(path), *(["--stage", stage] if b"run" in content else [])])
        except SystemExit as ended:
            if ended.code != 2 or "Traceback" in told.getvalue():
                raise BadData(f"status {ended.code}: {told.getvalue()}") from None
            told.getvalue().encode()
            return "refused"
    shown = yaml.safe_load(out.getvalue())
    _check_settings(yaml.safe_load(content.decode()), shown, "")
    if any(isinstance(value, float) and not math.isfinite(value) for _, value in leaves(shown)):
        raise BadData(f"a number that is none: {out.getvalue()}")
    (folder / "again.yaml").write_text(out.getvalue(), encoding="utf-8")
    from rlhf_dist.config.stages import config_of

    again = load_config(config_of(stage), folder / "again.yaml")
    whole = config_of(stage).model_validate(original)
    if again.model_dump(mode="json") != shown:
        raise BadData("what is shown is not what is read")
    return "equal" if again == whole else "consistent"


def _check_settings(given: Any, shown: Any, key: str) -> None:
    """All that the file says is in what is shown."""
    if isinstance(given, dict):
        if not isinstance(shown, dict):
            raise BadData(f"{key}: {given!r} is shown as {shown!r}")
        for name, value in given.items():
            _check_settings(value, shown.get(name, "absent"), f"{key}.{name}")
    elif isinstance(given, list) and isinstance(shown, list) and len(given) == len(shown):
        for number, (value, other) in enumerate(zip(given, shown, strict=True)):
            _check_settings(value, other, f"{key}.{number}")
    elif isinstance(given, bool) or isinstance(shown, bool):
        if str(given).lower() not in (
            str(shown).lower(),
            str(int(shown)),
            f"{int(shown)}.0",
            *(("yes", "on", "y", "t") if shown else ("no", "off", "n", "f")),
        ):
            raise BadData(f"{key}: {given!r} is shown as {shown!r}")
    elif isinstance(shown, int | float) and isinstance(given, int | float | str):
        if given != shown and float(given) != shown:
            raise BadData(f"{key}: {given!r} is shown as {shown!r}")
    elif given != shown and [given] != shown:
        raise BadData(f"{key}: {given!r} is shown as {shown!r}")


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if not inner:
        yield key, value
    for name, each in inner:
        yield from leaves(each, f"{key}.{name}" if key else str(name))


def as_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_floats(inner) for name, inner in value.items()}
    return [as_floats(inner) for inner in value] if isinstance(value, list) else float(value) if type(value) is int else value


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return repr(json.loads(one)) == repr(json.loads(other))
    except (ValueError, RecursionError):
        return False


def judge_newest(folder: Path, whole: bool) -> str:
    told: list[str] = []
    found = CheckpointStore(folder / "checkpoints").newest(told.append)
    if found is None:
        raise BadData(f"neither checkpoint is taken: {told}")
    if (found.step == 2) != whole or len(told) != (not whole):
        raise BadData(f"step {found.step} is taken: {told}")
    RunState.from_dict(found.state)
    return "equal" if whole else "refused"


def judge_fragments(folder: Path, whole: bool) -> str:
    saved = SavedState(folder)
    weights = saved.weights()
    index = json.loads((folder / INDEX).read_text())
    flats: dict[str, list[tuple[int, Any]]] = {}
    for rank in range(index["files"]):
        content = (folder / rank_file(rank)).read_bytes()
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        for name, (start, _) in json.loads(head["__metadata__"]["fragments"]).items():
            flats.setdefault(name, []).append((start, load_file(folder / rank_file(rank))[f"weight.{name}"]))
    buffers = load_file(folder / BUFFERS) if (folder / BUFFERS).is_file() else {}
    theirs = {
        name: np.concatenate([part for _, part in sorted(parts, key=lambda each: each[0])]) for name, parts in flats.items()
    } | buffers
    if weights.keys() != theirs.keys() or index["parameters"].keys() != flats.keys():
        raise BadData(f"{sorted(weights)} of {sorted(theirs)}")
    for name, weight in weights.items():
        if weight.numpy().tobytes() != theirs[name].tobytes() or (name in flats and list(weight.shape) != index["parameters"][name]):
            raise BadData(f"{name} has other numbers")
    return "equal" if whole else "consistent"


def judge_rollouts(folder: Path, whole: bool) -> str:
    batch, info = read_shard(folder, 0)
    text = json.loads((folder / "shard_0000.json").read_text())
    tensors = load_file(folder / "shard_0000.safetensors")
    said = (
        list(batch.prompts),
        list(batch.completions),
        {name: list(column) for name, column in batch.columns.items()},
        list(info.prompt_ids),
    )
    if repr(said) != repr((text["prompts"], text["completions"], text["columns"], text["info"]["prompt_ids"])):
        raise BadData(f"{said} is made of {text}")
    for name, numbers in tensors.items():
        held = getattr(batch, name)
        if held.numpy().tobytes() != numbers.tobytes() or len(held) != len(batch.prompts):
            raise BadData(f"{name} has other numbers")
    if {len(batch.completions), len(info.versions), *map(len, batch.columns.values())} != {len(batch.prompts)}:
        raise BadData("half a row")
    return "equal" if whole else "consistent"
