"""The loop that trains any task: steps, averages, log, checkpoints, guards. It speaks Accelerate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm import tqdm

from flashdit.shared.files import write_atomically
from flashdit.shared.locks import only_writer
from flashdit.shared.process import AUTO, AUTOCAST, float32_products
from flashdit.shared.progress import busy_with, progress_bar
from flashdit.shared.readers import read_batches
from flashdit.shared.runs import list_checkpoints
from flashdit.shared.seeds import generator_for
from flashdit.shared.settings import to_yaml
from flashdit.training.accelerator import (
    blocks_compiled_whole,
    compile_parts,
    gradient_strides_ignored,
    whole_norm,
)
from flashdit.training.batches import StepBatches, positions
from flashdit.training.buffers import StepBuffers, join_batch_norms
from flashdit.training.checkpoint import check_room
from flashdit.training.contents import check_contents, write_contents
from flashdit.training.decay import decay_groups, unused_texts
from flashdit.training.ema import Ema
from flashdit.training.guard import SkipGuard, Stopped, StopSignals
from flashdit.training.meter import Meter, matmul_peak, warn_if_slow
from flashdit.training.optim import (
    MUON,
    learning_rate,
    linear_weights,
    make_optimizer,
    unfinished_decay,
)
from flashdit.training.options import LoopConfig, share_of_batch
from flashdit.training.position import restore_run, save_checkpoint, what_is_trained
from flashdit.training.resume import main_first, newest_whole, open_run_folder
from flashdit.training.snapshots import SNAPSHOTS, drop_later, write_snapshots
from flashdit.training.state import local
from flashdit.training.task import PeriodicAction, Task, Tensors
from flashdit.training.tracking import Tracker, check_tracking
from iwin_core.kernels import kernels_wait
from iwin_core.kernels.cpu_attention import attention_of

logger = logging.getLogger(__name__)
KERNELS_HINT = "`make gpu` tries them, IWIN_KERNELS=triton turns them on"
AnyTask = TypeVar("AnyTask", bound=Task)


class TrainingLoop(Generic[AnyTask]):
    """Trains a task: resumes where checkpoints lie, then `fit()` makes the steps that are left.

    Args:
        config: The checked configuration, a dataclass.
        task: What is trained.
        accelerator: Of the run, as `start_run` returned it.

    Attributes:
        step: Optimiser steps made.
        stopped_by: The signal that ended `fit` before its last step; None where none did.
        images_seen: Images that they took, over all processes.
        model: The task's model; `network` is what it trains, `Task.trained`, as Accelerate wraps it.
        ema: The averages of its weights.

    Raises:
        ValueError: If the disk has no room, or a checkpoint cannot be resumed.
    """

    def __init__(self, config: LoopConfig, task: AnyTask, accelerator: Accelerator):
        self.config, self.task, self.accelerator, self.model = config, task, accelerator, task.model
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.run_dir, self.config_text = Path(config.run.dir), to_yaml(config)
        check_room(self.run_dir, task.trained, len(config.ema.power_widths))
        main_first(accelerator, lambda: check_tracking(config.tracking))
        self.step = self.images_seen = 0
        self.stopped_by: str | None = None
        self.known = list_checkpoints(self.run_dir)
        self.guard = SkipGuard(config.training.max_skips)
        forward = task.forward_flops()
        # The backward pass counts twice.
        self.flops_per_image = None if forward is None else 3 * forward + task.frozen_flops()
        self.meter = Meter(self.device, self.flops_per_image)
        self._prepare()
        rank_seed = generator_for(config.seed, "rank", accelerator.process_index).initial_seed()
        torch.manual_seed(rank_seed)  # drop path and the like differ from process to process
        self.resumed_from: Path | None = None
        found = newest_whole(self.run_dir, accelerator)
        if found is not None:
            self.resumed_from, saved = found
            main_first(accelerator, lambda: check_contents(found[0], self.config_text, task))
            restore_run(self, self.resumed_from, saved)

    def _prepare(self) -> None:
        """Compiles, wraps and moves the model, and makes optimiser and averages."""
        training = self.config.training
        if training.gradient_checkpointing:
            self.task.checkpoint_activations()
        self.about_norms = join_batch_norms(self.task.trained, self.device, self.accelerator.num_processes)
        compile_parts(self.model, self.task.blocks, training.compile)
        hidden = linear_weights(self.task.blocks()) if self.config.optimizer.name == MUON else ()
        groups = decay_groups(self.task.trained, self.config.optimizer, self.task.decays)
        optimizer = make_optimizer(groups, self.config.optimizer, hidden)
        self.network, self.optimizer = self.accelerator.prepare(self.task.trained, optimizer)
        self.ema = Ema(self.model, self.config.ema)
        self.buffers = StepBuffers(self.task.trained)

    def fit(self) -> Path:
        """Trains to `training.steps`, or until a signal ends it, and returns the run's folder.

        While it runs, no other process may train in the folder, and float32 products follow `training.tf32`.

        Raises:
            ValueError: If another process trains in the folder, or has done so since this run was opened.
        """
        if self.step >= self.config.training.steps:
            logger.info(
                "%s is already at step %d of %d", *(self.run_dir, self.step, self.config.training.steps)
            )
            return self.run_dir
        with ExitStack() as stack:
            main_first(self.accelerator, lambda: stack.enter_context(self._opened()))
            self._make_steps()
        return self.run_dir

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Makes the run's folder ready, with this process as its only writer."""
        with only_writer(self.run_dir, called="run.dir"):
            if any(path not in self.known for path in list_checkpoints(self.run_dir)):
                raise ValueError(f"{self.run_dir} was trained by another process meanwhile: start again")
            open_run_folder(self.run_dir, self.step)
            write_contents(self.run_dir, self.task.contents())
            for write in self.task.at_start:
                write()
            write_atomically(self.run_dir / "config.yaml", lambda path: path.write_text(self.config_text))
            drop_later(self.run_dir / SNAPSHOTS, self.step)
            config = asdict(cast(Any, self.config))
            self.tracker = Tracker(self.run_dir, self.config.tracking, config, self.step)
            logger.info(what_is_trained(self))
            unfinished = unfinished_decay(self.config.training.steps, self.config.optimizer)
            unused = unused_texts(self.task.trained, self.config.optimizer.no_decay)
            for line in filter(None, (self.about_norms, unfinished, unused)):
                logger.info(line)
            warn_if_slow(self.config.training.precision, self.device)
            if self.device.type == "cuda" and kernels_wait():
                logger.info("the fused kernels are off, as they have passed on no GPU yet: %s", KERNELS_HINT)
            try:
                yield
            finally:
                self.tracker.close()

    @property
    def outcome(self) -> str:
        """What `fit` came to, in a sentence."""
        if self.stopped_by is None:
            return f"trained to step {self.step}: {self.run_dir}"
        steps = self.config.training.steps
        how = "run the same command again to go on"
        return f"stopped at step {self.step} of {steps} by {self.stopped_by}: {how}"

    def _make_steps(self) -> None:
        """Makes the steps that are left, or fewer if a signal comes."""
        training = self.config.training
        self.network.train()
        self.batches = StepBatches(self._batches(), training.accumulation)
        bar = progress_bar(
            total=training.steps, initial=self.step, desc="train", unit="step", disable=not self.main
        )
        with ExitStack() as switches, StopSignals(speaks=self.main) as stop, bar:
            switches.enter_context(float32_products(tf32=training.tf32))
            switches.enter_context(blocks_compiled_whole(training.compile))
            if training.cpu_attention != AUTO:
                switches.enter_context(attention_of(training.cpu_attention))
            if self.flops_per_image:
                self.meter.peak_flops = matmul_peak(
                    self.device, AUTOCAST[training.precision] or torch.float32
                )
            self.meter.start_clock(self.images_seen)
            self._read()
            if self.batches.failure:
                raise self.batches.failure
            ended = False
            while self.step < training.steps and not ended:
                ended = self._make_step(stop)
                bar.update()
                ended = self._after_step(bar, stop, ended)
            self.guard.check_end(map(local, self.task.trained.parameters()))
            if ended and self.step < training.steps:
                self.stopped_by = stop.received or self._what_was_not_read()

    def _batches(self) -> Iterator[Any]:
        """Returns this process's batches from where the run stands to its end."""
        training, accelerator = self.config.training, self.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        share, updates = share_of_batch(training, processes), training.steps - self.step
        taken = positions(self.images_seen, updates, share, training.accumulation, rank, processes)
        return read_batches(
            self.task.examples,
            training.workers,
            batch_sampler=taken,
            collate_fn=self.task.collate,
            pin_memory=self.device.type == "cuda",  # from which a GPU copies without waiting
            persistent_workers=training.workers > 0,
            generator=torch.Generator(),  # its own: the global one stays where a resume would find it
        )

    def _what_was_not_read(self) -> str:
        """Returns what ended the run where this process received no signal.

        Raises:
            ValueError: If the data of the next step could not be read here.
        """
        if self.batches.failure is None:
            return "another process"
        raise ValueError(
            f"{self.batches.failure}; the run is saved at step {self.step} of {self.config.training.steps}: "
            "run the same command again to go on, once the data can be read"
        ) from self.batches.failure

    def _make_step(self, stop: StopSignals) -> bool:
        """Makes one optimiser step from its accumulated batches, or skips it on every process.

        Returns:
            Whether the run ends here because a process received a signal, or has no data for the next step.
        """
        accelerator, accumulation = self.accelerator, self.config.training.accumulation
        self.step += 1
        self.images_seen += self.config.training.global_batch_size
        self.lr = learning_rate(self.step, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)

        self.buffers.keep()
        for part in self.batches.parts:
            batch = send_to_device(part, self.device, non_blocking=True)
            with accelerator.accumulate(self.network):
                loss, terms = self.task.loss(self._forward, batch)
                for name, value in {"loss": loss, **terms}.items():
                    self.meter.add(name, value / accumulation)
                with gradient_strides_ignored():
                    accelerator.backward(loss)

        limit = self.config.optimizer.max_grad_norm  # without one the norm is only measured
        norm = whole_norm(
            accelerator.clip_grad_norm_(self.network.parameters(), math.inf if limit is None else limit)
        )
        self._read()  # while a GPU computes
        grad_norm, ended = self._wait(norm, stop)
        finite = math.isfinite(grad_norm)
        if finite or accelerator.scaler is not None:  # fp16's scaler skips by itself, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite:
            self.buffers.share()
            self.ema.update(self.model)
        else:
            self.buffers.restore()
        self.meter.add("grad_norm", norm)
        self.meter.end_step(finite)
        self.guard.record(finite, self.step, grad_norm)
        return ended or (accelerator.num_processes == 1 and self._must_end(stop))

    def _forward(self, *arguments: Any, **named: Any) -> Any:
        """Runs the network in the run's precision."""
        with self.accelerator.autocast():
            return self.network(*arguments, **named)

    def _read(self) -> None:
        """Reads the batches of the next step, and records how long that took."""
        started = time.perf_counter()
        self.batches.read()
        self.meter.waited_s += time.perf_counter() - started

    def _must_end(self, stop: StopSignals) -> bool:
        """Returns whether this process received a signal, or has no data for the next step."""
        return stop.received is not None or self.batches.failure is not None

    def _wait(self, norm: Tensor, stop: StopSignals) -> tuple[float, bool]:
        """Waits for the device, once a step: returns the gradient's norm, and whether all are to end here.

        All processes must end at the same step, so they exchange whether one of them must.
        """
        if self.accelerator.num_processes == 1:
            return norm.item(), False
        must_end = torch.full((), float(self._must_end(stop)), device=self.device)
        must_end = cast(Tensor, self.accelerator.reduce(must_end, "sum"))
        grad_norm, ending = torch.stack([norm.float(), must_end]).tolist()
        return grad_norm, ending > 0

    def _due(self, every: int) -> bool:
        """Returns whether what is done every so many steps, and after the last, is due now."""
        return every > 0 and (self.step == self.config.training.steps or self.step % every == 0)

    def _after_step(self, bar: tqdm, stop: StopSignals, ended: bool) -> bool:
        """Evaluates, logs and saves where the step is one for it; a run that ends here is saved.

        Returns:
            Whether the run ends here.
        """
        training = self.config.training
        actions = [] if ended else [action for action in self.task.actions if self._due(action.every)]
        snapshot = self.step % self.config.ema.snapshot_every == 0
        average = self.ema.state() if actions else {}
        with busy_with(bar, "previews and scores") if actions else nullcontext():
            try:
                numbers, ended = self._act(actions, average, stop, ended)
            except (ValueError, OSError):
                if self.accelerator.num_processes == 1:  # else the others wait within the action
                    save_checkpoint(self, average, self.ema.tracks_state())
                    logger.info("saved at step %d, whose previews and scores failed", self.step)
                raise
        save = ended or self._due(training.save_every)
        average = self.ema.state() if save and not actions else average
        tracks = self.ema.tracks_state() if save or snapshot else {}
        if snapshot and self.main:
            write_snapshots(self.run_dir / SNAPSHOTS, self.step, tracks)
        if numbers or self._due(training.log_every):
            bar.set_postfix(self._log(numbers), refresh=False)
        if save:
            with busy_with(bar, "saving"):
                save_checkpoint(self, average, tracks)
        return ended

    def _act(
        self, actions: list[PeriodicAction], average: Tensors, stop: StopSignals, ended: bool
    ) -> tuple[dict[str, float], bool]:
        """Runs actions; returns their numbers, and whether a signal ended one or the run ended before.

        With several processes an action runs to its end, since they exchange values within it.
        """
        numbers: dict[str, float] = {}
        try:
            for action in actions:
                with stop.ending(self.accelerator.num_processes == 1):
                    numbers |= action.run(self.step, average)
        except Stopped:
            logger.info("the previews and scores of step %d are left out", self.step)
            return numbers, True
        return numbers, ended

    def _log(self, numbers: dict[str, float]) -> dict[str, str]:
        """Writes the means since the last record and returns what the progress bar shows."""
        names, means = self.meter.means()
        means = cast(Tensor, self.accelerator.reduce(means, "mean")) if names else means
        timings = self.meter.timings(self.images_seen, self.accelerator.num_processes)
        record = {
            "step": self.step,
            "images_seen": self.images_seen,
            "epoch": self.images_seen / self.task.images_per_epoch,
            "lr": self.lr,
            **dict(zip(names, means.tolist(), strict=True)),
            **({"skipped": self.guard.skipped} if self.guard.skipped else {}),
            **({"scores": [*numbers]} if numbers else {}),  # so that plots tell them from losses
            **numbers,
            **timings,
        }
        if self.main:
            self.tracker.log(record)
        self.meter.start()
        self.meter.start_clock(self.images_seen)
        shown = {"epoch": f"{record['epoch']:.2f}", "images/s": f"{record['images_per_s']:.0f}"}
        return shown | {name: f"{record[name]:.4f}" for name in ("loss", *numbers) if name in record}
