"""The loop that trains any task: steps, averages, log, checkpoints, guards. It speaks Accelerate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from flashdit.shared.files import write_atomically
from flashdit.shared.process import AUTOCAST, float32_products
from flashdit.shared.runs import list_checkpoints, read_state, step_folder
from flashdit.shared.seeds import generator_for
from flashdit.shared.settings import to_yaml
from flashdit.shared.weights import read_tensors
from flashdit.training.accelerator import blocks_compiled_whole, gradient_strides_ignored, whole_norm
from flashdit.training.batches import make_loader, positions
from flashdit.training.checkpoint import check_room, prune, write_checkpoint
from flashdit.training.ema import Ema
from flashdit.training.guard import SkipGuard, TermSignal
from flashdit.training.meter import Meter, matmul_peak
from flashdit.training.optim import learning_rate, make_optimizer
from flashdit.training.options import LoopConfig, share_of_batch
from flashdit.training.profiles import Profile
from flashdit.training.snapshots import SNAPSHOTS, TRACKS, drop_later, read_tracks, write_snapshots
from flashdit.training.state import load_model_state, load_optimizer_state, model_state, optimizer_state
from flashdit.training.task import Task, Tensors
from flashdit.training.tracking import Tracker

logger = logging.getLogger(__name__)
AnyTask = TypeVar("AnyTask", bound=Task)


class TrainingLoop(Generic[AnyTask]):
    """Trains a task: resumes where checkpoints lie, then `fit()` makes the steps that are left.

    Args:
        config: The checked configuration, a dataclass.
        task: What is trained.
        accelerator: Of the run, as `start_run` returned it.

    Attributes:
        step: Optimiser steps made.
        images_seen: Images that they took, over all processes.
        model: The task's model; `network` is the same one as Accelerate wraps it.
        ema: The averages of its weights.

    Raises:
        ValueError: If the disk has no room, or a checkpoint cannot be resumed.
    """

    def __init__(self, config: LoopConfig, task: AnyTask, accelerator: Accelerator):
        self.config, self.task, self.accelerator, self.model = config, task, accelerator, task.model
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.run_dir, self.config_text = Path(config.run.dir), to_yaml(config)
        check_room(self.run_dir, self.model, len(config.ema.power_widths))
        self.step = self.images_seen = 0
        self.guard = SkipGuard(config.training.max_skips)
        forward = task.forward_flops()
        self.flops_per_image = None if forward is None else 3 * forward  # the backward pass counts twice
        self.meter = Meter(self.device, self.flops_per_image)
        self._prepare()
        rank_seed = generator_for(config.seed, "rank", accelerator.process_index).initial_seed()
        torch.manual_seed(rank_seed)  # drop path and the like differ from process to process
        for checkpoint in list_checkpoints(self.run_dir)[-1:]:
            self._resume(checkpoint)

    def _prepare(self) -> None:
        """Compiles, wraps and moves the model, and makes optimiser and averages."""
        training = self.config.training
        if training.gradient_checkpointing:
            self.task.checkpoint_activations()
        if training.compile == "model":
            self.model.compile()
        elif training.compile == "block":
            for block in self.task.blocks():
                block.compile()
        optimizer = make_optimizer(self.task.parameter_groups(), self.config.optimizer)
        self.network, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.ema = Ema(self.model, self.config.ema)

    def _resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint: weights, averages, optimiser, loss scaler, position, random state."""
        state = read_state(checkpoint)
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.guard.skipped, self.guard.in_a_row = state["skipped"], state["skipped_in_a_row"]
        load_model_state(self.model, read_tensors(checkpoint / "model"))
        tracks = read_tracks(checkpoint / TRACKS)
        self.ema.load(read_tensors(checkpoint / "ema"), state["ema_updates"], tracks)
        saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        load_optimizer_state(self.model, self.optimizer.optimizer, saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        states = torch.load(checkpoint / "processes.pt", weights_only=True)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        if len(states) != processes and self.main:
            logger.info("resumed with %d processes, was %d; images seen go on", processes, len(states))
        if rank < len(states):
            torch.set_rng_state(states[rank]["cpu"])
            if self.device.type == "cuda" and "cuda" in states[rank]:
                torch.cuda.set_rng_state(states[rank]["cuda"], self.device)
        if len(states) == processes:
            self.meter.load(states[rank]["meter"])

    def fit(self) -> Path:
        """Trains to `training.steps`, or until SIGTERM, and returns the run's folder.

        While it runs, float32 products follow `training.tf32`.
        """
        training = self.config.training
        if self.step >= training.steps:
            logger.info("%s is already at step %d of %d", self.run_dir, self.step, training.steps)
            return self.run_dir
        if self.main:
            write_atomically(self.run_dir / "config.yaml", lambda path: path.write_text(self.config_text))
            drop_later(self.run_dir / SNAPSHOTS, self.step)
            config = asdict(cast(Any, self.config))
            self.tracker = Tracker(self.run_dir, self.config.tracking, config, self.step)
        self.network.train()
        batches = self._batches()  # before signals are handled, which processes that read would inherit
        bar = tqdm(total=training.steps, initial=self.step, desc="train", unit="step", disable=not self.main)
        switches = float32_products(tf32=training.tf32), blocks_compiled_whole(training.compile)
        with switches[0], switches[1], TermSignal() as term, bar:
            if self.flops_per_image:
                self.meter.peak_flops = matmul_peak(
                    self.device, AUTOCAST[training.precision] or torch.float32
                )
            self.meter.start_clock(self.images_seen)
            ended = False
            while self.step < training.steps and not ended:
                ended = self._make_step(batches, term)
                bar.update()
                self._after_step(bar, ended)
        if self.main:
            self.tracker.close()
        return self.run_dir

    def _batches(self) -> Iterator[Tensors]:
        """Returns this process's batches from where the run stands to its end."""
        training, accelerator = self.config.training, self.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        share, updates = share_of_batch(training, processes), training.steps - self.step
        taken = positions(self.images_seen, updates, share, training.accumulation, rank, processes)
        return iter(make_loader(self.task.examples, taken, training.workers, self.device.type == "cuda"))

    def _make_step(self, batches: Iterator[Tensors], term: TermSignal) -> bool:
        """Makes one optimiser step from its accumulated batches, or skips it on every process.

        Returns:
            Whether the run ends here because a process received SIGTERM.
        """
        accelerator, accumulation = self.accelerator, self.config.training.accumulation
        self.step += 1
        self.images_seen += self.config.training.global_batch_size
        self.lr = learning_rate(self.step, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)

        for _ in range(accumulation):
            batch = self._next(batches)
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
        grad_norm, ended = self._wait(norm, term)
        finite = math.isfinite(grad_norm)
        if finite or accelerator.scaler is not None:  # fp16's scaler skips by itself, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite:
            self.ema.update(self.model)
        self.meter.add("grad_norm", norm)
        self.meter.end_step(finite)
        self.guard.record(finite, self.step, grad_norm)
        return ended or (accelerator.num_processes == 1 and term.received)

    def _forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Runs the network in the run's precision."""
        with self.accelerator.autocast():
            return self.network(*arguments, **named)

    def _next(self, batches: Iterator[Tensors]) -> Tensors:
        """Returns the next batch on the device, and records how long that took."""
        started = time.perf_counter()
        batch = next(batches)
        self.meter.waited_s += time.perf_counter() - started
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _wait(self, norm: Tensor, term: TermSignal) -> tuple[float, bool]:
        """Waits for the device, once a step: returns the gradient's norm, and whether all are to end here.

        All processes must end at the same step, so they exchange whether one of them received SIGTERM.
        """
        if self.accelerator.num_processes == 1:
            return norm.item(), False
        received = torch.full((), float(term.received), device=self.device)
        received = cast(Tensor, self.accelerator.reduce(received, "sum"))
        grad_norm, ending = torch.stack([norm.float(), received]).tolist()
        return grad_norm, ending > 0

    def _due(self, every: int) -> bool:
        """Returns whether what is done every so many steps, and after the last, is due now."""
        return every > 0 and (self.step == self.config.training.steps or self.step % every == 0)

    def _after_step(self, bar: tqdm, ended: bool) -> None:
        """Evaluates, logs and saves where the step is one for it; a run that ends here is saved."""
        training = self.config.training
        actions = [action for action in self.task.actions if self._due(action.every)]
        save = ended or self._due(training.save_every)
        snapshot = self.step % self.config.ema.snapshot_every == 0
        average = self.ema.state() if save or actions else {}
        tracks = self.ema.tracks_state() if save or snapshot else {}
        if snapshot and self.main:
            write_snapshots(self.run_dir / SNAPSHOTS, self.step, tracks)
        numbers: dict[str, float] = {}
        for action in actions:
            numbers |= action.run(self.step, average)
        if actions or self._due(training.log_every):
            bar.set_postfix(self._log(numbers))
        if save:
            self._save(average, tracks)

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

    def _save(self, average: Tensors, tracks: dict[Profile, Tensors]) -> None:
        """Writes a checkpoint; every process calls it, the main one writes."""
        mine: dict[str, Any] = {"cpu": torch.get_rng_state(), "meter": self.meter.state()}
        if self.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.device)
        processes = gather_object([mine])
        weights = model_state(self.model)
        scaler = self.accelerator.scaler
        optimizer = {
            "optimizer": optimizer_state(self.model, self.optimizer.optimizer),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        position = {
            "step": self.step,
            "images_seen": self.images_seen,
            "ema_updates": self.ema.updates,
            "skipped": self.guard.skipped,
            "skipped_in_a_row": self.guard.in_a_row,
        }
        if self.main:

            def write_models(folder: Path) -> None:
                self.task.write_models(folder, weights, average)
                write_snapshots(folder / TRACKS, self.step, tracks)

            state = position | self.task.state()
            folder = step_folder(self.run_dir, self.step)
            write_checkpoint(folder, write_models, optimizer, processes, self.config_text, state)
            prune(self.run_dir, self.config.training.keep_last, self.config.training.keep_every)
        self.accelerator.wait_for_everyone()
