"""Makes pairs of the sentence polarity data: a favourable sentence about a film over an unfavourable one.

    python configs/recipes/polarity/build_pairs.py path/to/sentence_polarity.zip     # writes runs/polarity/{train,held_out}.jsonl

The zip holds rt-polarity.pos and rt-polarity.neg, one sentence a line (Pang and Lee 2005; CC BY 4.0). Every sentence stands in one pair;
a fifth of the pairs is held out, so no sentence stands on both sides. The pairs have no prompt: the sentence alone is judged.
"""

from __future__ import annotations

import argparse
import json
import random
import zipfile
from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[3] / "runs" / "polarity"
HELD_OUT = 0.2


def sentences(archive: zipfile.ZipFile, name: str) -> list[str]:
    """The lines of one of the files, each once."""
    member = next(entry for entry in archive.namelist() if entry.endswith(name))
    return list(dict.fromkeys(line.strip() for line in archive.read(member).decode("utf-8").splitlines() if line.strip()))


def pairs(path: Path, seed: int) -> list[dict[str, str]]:
    """As many pairs as there are sentences of either kind that do not stand in both files, drawn at random."""
    with zipfile.ZipFile(path) as archive:
        liked, disliked = sentences(archive, "rt-polarity.pos"), sentences(archive, "rt-polarity.neg")
    both = set(liked) & set(disliked)
    liked, disliked = ([text for text in side if text not in both] for side in (liked, disliked))
    draw = random.Random(seed)
    draw.shuffle(liked)
    draw.shuffle(disliked)
    return [{"chosen": better, "rejected": worse} for better, worse in zip(liked, disliked, strict=False)]


def build(path: Path, output: Path, seed: int = 0) -> dict[str, int]:
    """Writes both files; returns how many pairs each has."""
    rows = pairs(path, seed)
    held_out = round(HELD_OUT * len(rows))
    output.mkdir(parents=True, exist_ok=True)
    sides = {"held_out": rows[:held_out], "train": rows[held_out:]}
    for name, side in sides.items():
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in side), encoding="utf-8")
    return {name: len(side) for name, side in sides.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zip", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    print(", ".join(f"{name}: {count} pairs" for name, count in build(arguments.zip, arguments.output).items()), f"-> {arguments.output}")
