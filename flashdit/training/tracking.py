"""Metrics of a run: metrics.jsonl always, wandb when asked."""

from __future__ import annotations

import json
import logging
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashdit.shared.command import need_extra
from flashdit.shared.files import write_atomically
from flashdit.shared.runs import METRICS_FILE

logger = logging.getLogger(__name__)
WANDB_ID = "wandb_id.txt"
ACCOUNT = "`wandb login` first, or WANDB_MODE=offline, whose records `wandb sync` sends later"


@dataclass(kw_only=True)
class TrackingOptions:
    """Options of tracking."""

    wandb: bool = False
    """Whether to log to wandb as well; WANDB_MODE=offline needs no account."""
    project: str = "flashdit"
    """The project in wandb."""

    def __post_init__(self) -> None:
        """Checks the values."""
        if not self.project:
            raise ValueError("project must not be empty, got ''")


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
        kept = [line for number, line in self._lines() if self._step_of(line, number) <= step]
        write_atomically(self.path, lambda path: path.write_text("".join(kept)))
        self.wandb_run = _start_wandb(run_dir, options, config) if options.wandb else None

    def _lines(self) -> list[tuple[int, str]]:
        """Returns the numbered lines there are, without a last one that a kill cut short."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        return [(number, line) for number, line in enumerate(lines, start=1) if line.endswith("\n")]

    def _step_of(self, line: str, number: int) -> float:
        """Returns the step of a record; a line that is none is named, and comes after every step."""
        try:
            return float(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: line %d is no record and is left out", self.path, number)
            return math.inf

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


def check_tracking(options: TrackingOptions) -> None:
    """Raises ValueError where wandb is asked for and is not installed, or has no account here."""
    if not options.wandb:
        return
    wandb: Any = need_extra("wandb", "wandb")
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise ValueError(f"tracking.wandb needs an account on this machine: {ACCOUNT}")


def _start_wandb(run_dir: Path, options: TrackingOptions, config: dict[str, Any]) -> Any:
    """Returns the wandb run of this run folder: the same one after a resume."""
    wandb: Any = need_extra("wandb", "wandb")

    stored = run_dir / WANDB_ID
    if not stored.exists():
        write_atomically(stored, lambda path: path.write_text(uuid.uuid4().hex[:8]))
    try:
        return wandb.init(
            project=options.project,
            name=run_dir.name,
            id=stored.read_text(),
            resume="allow",
            dir=run_dir,
            config=config,
        )
    except wandb.errors.Error as error:
        raise ValueError(f"tracking.wandb could not begin, {error}: {ACCOUNT}") from error
