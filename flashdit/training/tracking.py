"""Metrics of a run: metrics.jsonl always, wandb when asked."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashdit.shared.command import need_extra
from flashdit.shared.files import write_atomically
from flashdit.shared.runs import METRICS_FILE

WANDB_ID = "wandb_id.txt"


@dataclass(kw_only=True)
class TrackingOptions:
    """Options of tracking."""

    wandb: bool = False
    """Whether to log to wandb as well; WANDB_MODE=offline needs no account."""
    project: str = "flashdit"
    """The project in wandb."""


class Tracker:
    """Appends records to metrics.jsonl, and to the run's one wandb run.

    Args:
        run_dir: The run's folder.
        options: Whether and where wandb is.
        config: The resolved configuration, for wandb.
        step: The step that the run continues from; later records of an earlier attempt are dropped.
    """

    def __init__(self, run_dir: Path, options: TrackingOptions, config: dict[str, Any], step: int):
        self.path = run_dir / METRICS_FILE
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        write_atomically(self.path, lambda path: path.write_text("".join(kept)))
        self.wandb_run = _start_wandb(run_dir, options, config) if options.wandb else None

    def _lines(self) -> list[str]:
        """Returns the records there are, without a last line that a kill cut short."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def log(self, record: dict[str, Any]) -> None:
        """Appends one record; it names its `step`."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        """Ends the wandb run, if there is one."""
        if self.wandb_run is not None:
            self.wandb_run.finish()


def _start_wandb(run_dir: Path, options: TrackingOptions, config: dict[str, Any]) -> Any:
    """Returns the wandb run of this run folder: the same one after a resume."""
    wandb: Any = need_extra("wandb", "wandb")

    stored = run_dir / WANDB_ID
    if not stored.exists():
        write_atomically(stored, lambda path: path.write_text(uuid.uuid4().hex[:8]))
    return wandb.init(
        project=options.project,
        name=run_dir.name,
        id=stored.read_text(),
        resume="allow",
        dir=run_dir,
        config=config,
    )
