"""The folder a run leaves behind: one place that knows every file name in it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.atomic import write_text

MARKER = ".rlhf_dist_run"
"""Tells a folder of ours from any other: only a folder that holds it is ever emptied."""

INPUTS = "inputs.json"
"""What the run read when it began."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    Example::

        runs/ppo/config.yaml  metrics.jsonl  summary.json  tensorboard/
                 rollouts/step_000001.parquet  evaluation/step_000000.parquet
                 checkpoints/step_000010/  export/policy/  export/value/  report/
    """

    root: Path

    @classmethod
    def named(cls, output_dir: str | Path, name: str) -> RunFolder:
        """Where a run's folder is, or would be.

        Raises:
            UserError: the name leads elsewhere.
        """
        if name in ("", ".", "..") or Path(name).name != name:
            raise UserError(f"{name!r} cannot name a run folder", where="run.name", fix="use letters, digits, '_', '-' and '.'")
        return cls(Path(output_dir).expanduser().absolute() / name)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended by itself."""
        return (self.root / MARKER).is_file() and self.summary.is_file()

    @classmethod
    def create(cls, output_dir: str | Path, name: str, overwrite: bool = False, resume: bool = False) -> RunFolder:
        """Makes `output_dir/name`, absolute, because workers may stand in another folder. With `resume` a run's folder stays as it is.

        Raises:
            UserError: the folder holds something and `overwrite` is off, or it is not a run folder, or it cannot be written, or it is a
                link that leads elsewhere.
        """
        root = cls.named(output_dir, name).root
        if not root.resolve().is_relative_to(root.parent.resolve()):
            raise UserError(
                "the run folder is a link that leads out of run.output_dir", where=str(root), fix="set run.output_dir to where it leads"
            )
        try:
            if root.exists() and not (resume and (root / MARKER).is_file()):
                _make_room(root, overwrite)
            root.mkdir(parents=True, exist_ok=True)
            (root / MARKER).touch()
            folder = cls(root)
            for child in (folder.tensorboard, folder.rollouts, folder.evaluation, folder.checkpoints, folder.export):
                child.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the run folder: {error.strerror}", where=str(root), fix="set run.output_dir to a folder you may write to"
            ) from None
        return folder

    @classmethod
    def open(cls, root: str | Path) -> RunFolder:
        """A run folder that exists.

        Raises:
            UserError: it is not one.
        """
        path = Path(root).expanduser().absolute()
        if not (path / MARKER).is_file():
            raise UserError("not a run folder", where=str(path), fix="pass the folder that a run made (run.output_dir/run.name)")
        return cls(path)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def inputs(self) -> Path:
        """Hashes of the data, models and reward functions that the run began with."""
        return self.root / "inputs.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def rollouts(self) -> Path:
        """Training samples, a Parquet file a step."""
        return self.root / "rollouts"

    @property
    def evaluation(self) -> Path:
        """Held-out samples, a Parquet file an evaluation."""
        return self.root / "evaluation"

    @property
    def report(self) -> Path:
        """What a stage reports at its end, made where there is something to report."""
        return self.root / "report"

    @property
    def quarantine(self) -> Path:
        """Samples on which a reward failed, one JSON object a line; made where there is one."""
        return self.root / "quarantine.jsonl"

    @property
    def reports(self) -> Path:
        """What was seen of stuck processes."""
        return self.root / "reports"

    @property
    def capsules(self) -> Path:
        """Steps that were skipped because something was not finite, each with all that is needed to see it again."""
        return self.root / "capsules"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints taken during the run."""
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        """The final models."""
        return self.root / "export"

    @property
    def export_policy(self) -> Path:
        """The final policy, a Hugging Face folder."""
        return self.export / "policy"

    @property
    def export_value(self) -> Path:
        """The final value model, a Hugging Face folder."""
        return self.export / "value"

    @property
    def summary(self) -> Path:
        """What came out of the run."""
        return self.root / "summary.json"

    def rollouts_path(self, step: int) -> Path:
        """Samples of one training step."""
        return self.rollouts / f"step_{step:06d}.parquet"

    def forget_after(self, step: int) -> None:
        """Removes samples and capsules of steps after `step`, and what says that the run is over."""
        for folder in (self.rollouts, self.evaluation):
            for path in folder.glob("step_*.parquet"):
                if int(path.stem.removeprefix("step_")) > step:
                    path.unlink()
        for path in self.capsules.glob("step_*"):
            if int(path.name.split("_")[1]) > step:
                shutil.rmtree(path)
        self.summary.unlink(missing_ok=True)

    def evaluation_path(self, step: int) -> Path:
        """Held-out samples of the policy after `step` steps; 0 is before training."""
        return self.evaluation / f"step_{step:06d}.parquet"

    def write_config(self, text: str) -> None:
        """Saves the resolved configuration."""
        write_text(self.config, text)

    def clear_unused(self) -> bool:
        """Empties the folder of a run that recorded nothing, so that the next try needs no `overwrite`; returns whether it did.

        What it was asked to do (its settings) and open files of metrics are nothing; a sample in quarantine, say, is something.
        """
        if not (self.root / MARKER).is_file() or any(self._tells(path) for path in self.root.rglob("*")):
            return False
        _empty(self.root)
        (self.root / MARKER).unlink()
        return True

    def _tells(self, path: Path) -> bool:
        """Whether a path inside is more than a run makes before it does anything."""
        if path.is_dir() and not path.is_symlink():
            return False
        made = path in (self.root / MARKER, self.config, self.root / INPUTS, self.evaluation_path(0)) or path.is_relative_to(self.tensorboard)
        return not made and not (path == self.metrics and path.stat().st_size == 0)


def _make_room(root: Path, overwrite: bool) -> None:
    if not root.is_dir():
        raise UserError("the run folder is a file", where=str(root), fix="set run.name to another name")
    children = list(root.iterdir())
    if not children:
        return
    if not overwrite:
        raise UserError(
            "the run folder exists and is not empty",
            where=str(root),
            fix="set run.name to another name, run.resume=auto to go on with it, or run.overwrite=true to replace it",
        )
    if not (root / MARKER).is_file():
        raise UserError(
            "run.overwrite is set, but the folder was not made by a run: it is left alone",
            where=str(root),
            fix="set run.name to another name",
        )
    _empty(root)


def _empty(root: Path) -> None:
    """The contents go, not the folder: it may be a mount. The marker stays, so that a second try after a failure still works."""
    for child in root.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != MARKER:
            child.unlink()
