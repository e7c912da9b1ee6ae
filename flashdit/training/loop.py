"""The loop that every trainer shares: steps, EMA, log, checkpoints, guards. It speaks Accelerate."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from flashdit.shared.files import write_atomically
from flashdit.shared.process import keep_freed_memory
from flashdit.shared.runs import list_checkpoints, read_state, read_weights, step_folder
from flashdit.shared.seeds import generator_for
from flashdit.training.accelerator import make_accelerator
from flashdit.training.checkpoint import check_room, check_unchanged, prune, write_checkpoint
from flashdit.training.ema import Ema
from flashdit.training.guard import SkipGuard, TermSignal
from flashdit.training.meter import Meter, matmul_peak
from flashdit.training.optim import learning_rate, make_optimizer
from flashdit.training.options import DTYPES, LoopConfig, TrainingOptions
from flashdit.training.power_ema import PowerEma, Profile
from flashdit.training.snapshots import SNAPSHOTS, TRACKS, drop_later, read_tracks, write_snapshots
from flashdit.training.state import load_model_state, load_optimizer_state, model_state, optimizer_state
from flashdit.training.tracking import Tracker

logger = logging.getLogger(__name__)
Batch = dict[str, Tensor]


class TrainingLoop(ABC):
    """Builds and checks everything, resumes where checkpoints lie, then `fit()` trains.

    A trainer says what is built, what a batch costs, and what a checkpoint holds of its models.

    Args:
        config: The checked configuration, a dataclass.
        to_yaml: Writes it as text.

    Attributes:
        fixed_on_resume: Prefixes of configuration keys that a resumed run may not change.

    Raises:
        ValueError: If data, model and run folder do not fit together.
    """

    fixed_on_resume: tuple[str, ...] = ("seed", "data.", "model.")

    def __init__(self, config: LoopConfig, to_yaml: Callable[[Any], str]):
        self.config, training = config, config.training
        self.config_text = to_yaml(config)
        self.accelerator = make_accelerator(training)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.run_dir = Path(config.run.dir)
        self.batch_size = share_of_batch(training, self.accelerator.num_processes)
        checkpoints = list_checkpoints(self.run_dir)
        if checkpoints:
            changed = check_unchanged(checkpoints[-1], self.config_text, self.fixed_on_resume)
            for line in changed if self.main else ():
                logger.info(line)
        torch.manual_seed(config.seed)
        self.model = self.build()
        check_room(self.run_dir, self.model, len(config.ema.power_widths))
        self.step = self.images_seen = 0
        self.guard = SkipGuard(training.max_skips)
        self.flops_per_image = self._flops_per_image()
        self.meter = Meter(self.device, self.flops_per_image)
        self._prepare()
        rank_seed = generator_for(config.seed, "rank", self.accelerator.process_index).initial_seed()
        torch.manual_seed(rank_seed)  # drop path and the like differ from process to process
        if checkpoints:
            self._resume(checkpoints[-1])

    @abstractmethod
    def build(self) -> nn.Module:
        """Opens the data, builds the model and checks that they fit."""

    @abstractmethod
    def examples(self) -> tuple[Dataset, int]:
        """Returns the data set, by position in the endless stream of images, and the images of an epoch."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the scalar loss of a batch on the device, and the terms to log."""

    @abstractmethod
    def write_models(self, folder: Path, weights: dict[str, Tensor], average: dict[str, Tensor]) -> None:
        """Makes a checkpoint's folder with the model in `model/`, its average in `ema/`, and the like."""

    def parameter_groups(self) -> Iterable[Any]:
        """Returns what the optimiser takes."""
        return self.model.parameters()

    def blocks(self) -> Iterable[nn.Module]:
        """Returns the parts that are compiled one by one."""
        return cast(Iterable[nn.Module], self.model.blocks)

    def checkpoint_activations(self) -> None:
        """Makes the model compute its blocks again in the backward pass."""
        self.model.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]

    def describe(self) -> dict[str, Any]:
        """Returns what state.json holds beside the position."""
        return {}

    def look_every(self) -> tuple[int, ...]:
        """Returns after how many steps the averaged model is looked at, for each way to look; 0 is never."""
        return (self.config.training.preview_every,)

    def look(self, average: dict[str, Tensor]) -> dict[str, float]:
        """Looks at the averaged model in the ways that are due; returns numbers for the log.

        All processes call it.
        """
        return {}

    def due(self, every: int) -> bool:
        """Returns whether what is done every so many steps, and after the last, is due now."""
        return every > 0 and (self.step == self.config.training.steps or self.step % every == 0)

    def forward_flops(self) -> float | None:
        """Returns the FLOPs of one image's forward pass; None where that is not known."""
        return None

    def _flops_per_image(self) -> float | None:
        """Returns the FLOPs of a forward and backward pass; the backward pass counts twice."""
        forward = self.forward_flops()
        return None if forward is None else 3 * forward

    def _prepare(self) -> None:
        """Compiles, wraps and moves the model, and makes optimiser and average."""
        training = self.config.training
        if training.gradient_checkpointing:
            self.checkpoint_activations()
        if training.compile == "model":
            self.model.compile()
        elif training.compile == "block":
            torch._dynamo.config.optimize_ddp = False  # DDP's buckets would cut blocks into smaller graphs
            for block in self.blocks():
                block.compile()
        optimizer = make_optimizer(self.parameter_groups(), self.config.optimizer)
        self.network, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.ema = Ema(self.model, self.config.ema)
        self.power_ema = PowerEma(self.model, self.config.ema)

    def _resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint: weights, EMA, optimiser, loss scaler, position, random state."""
        state = read_state(checkpoint)
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.guard.skipped, self.guard.in_a_row = state["skipped"], state["skipped_in_a_row"]
        load_model_state(self.model, read_weights(checkpoint / "model"))
        self.ema.load(read_weights(checkpoint / "ema"), state["ema_updates"])
        self.power_ema.load(read_tracks(checkpoint / TRACKS), state["ema_updates"])
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
        """Trains to `training.steps`, or until SIGTERM, and returns the run's folder."""
        training = self.config.training
        if self.step >= training.steps:
            logger.info("%s is already at step %d of %d", self.run_dir, self.step, training.steps)
            return self.run_dir
        if self.main:
            write_atomically(self.run_dir / "config.yaml", lambda path: path.write_text(self.config_text))
            drop_later(self.run_dir / SNAPSHOTS, self.step)
            config = asdict(cast(Any, self.config))
            self.tracker = Tracker(self.run_dir, self.config.tracking, config, self.step)
        if self.flops_per_image:
            self.meter.peak_flops = matmul_peak(self.device, DTYPES[training.precision])
        self.network.train()
        batches = iter(self._batches())
        bar = tqdm(total=training.steps, initial=self.step, desc="train", unit="step", disable=not self.main)
        with TermSignal() as term, bar:
            self.meter.start_clock(self.images_seen)
            ended = False
            while self.step < training.steps and not ended:
                self._update(batches)
                bar.update()
                ended = self._any(term.received)
                self._after_step(bar, ended)
        if self.main:
            self.tracker.close()
        return self.run_dir

    def _any(self, received: bool) -> bool:
        """Returns whether a process was told to end: all of them must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return received
        flag = torch.tensor(float(received), device=self.device)
        return bool(cast(Tensor, self.accelerator.reduce(flag, "sum")) > 0)

    def _after_step(self, bar: tqdm, ended: bool) -> None:
        """Looks, logs and saves where the step is one for it; a run that is told to end only saves."""
        training = self.config.training
        save = ended or self.due(training.save_every)
        looks = any(map(self.due, self.look_every()))
        snapshot = self.step % self.config.ema.snapshot_every == 0
        average = self.ema.state() if save or looks else {}
        tracks = self.power_ema.state() if save or snapshot else {}
        if snapshot and self.main:
            write_snapshots(self.run_dir / SNAPSHOTS, self.step, tracks)
        numbers = self.look(average) if looks else {}
        if looks or self.due(training.log_every):
            bar.set_postfix(self._log(numbers))
        if save:
            self._save(average, tracks)

    def _batches(self) -> DataLoader:
        """Returns this process's batches from where the run stands to its end."""
        training, accelerator = self.config.training, self.accelerator
        examples, self.images_per_epoch = self.examples()
        sampler = positions(
            self.images_seen,
            training.steps - self.step,
            self.batch_size,
            training.accumulation,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return DataLoader(
            examples,
            batch_sampler=cast(Any, sampler),
            collate_fn=as_batch,
            num_workers=training.workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=training.workers > 0,
            generator=torch.Generator(),  # its own: the global one stays where a resume would find it
        )

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch on the device, and notes how long that took."""
        started = time.perf_counter()
        batch = next(batches)
        self.meter.waited_s += time.perf_counter() - started
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _update(self, batches: Iterator[Batch]) -> None:
        """Makes one optimiser step from its accumulated batches, or skips it on every process."""
        options, accelerator = self.config.optimizer, self.accelerator
        self.step += 1
        self.images_seen += self.config.training.global_batch_size
        self.lr = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        norm = torch.zeros(())
        for _ in range(self.config.training.accumulation):
            with accelerator.accumulate(self.network):
                loss, terms = self.loss(self._next(batches))
                for name, value in {"loss": loss, **terms}.items():
                    self.meter.add(name, value / self.config.training.accumulation)
                accelerator.backward(loss)
                if accelerator.sync_gradients:  # without a limit the norm is only measured
                    limit = math.inf if options.max_grad_norm is None else options.max_grad_norm
                    norm = whole_norm(accelerator.clip_grad_norm_(self.network.parameters(), limit))
                    if norm.isfinite() or accelerator.scaler is not None:  # fp16's scaler skips by itself
                        self.optimizer.step()
                    self.optimizer.zero_grad()
        healthy = bool(norm.isfinite())
        if healthy:
            self.ema.update(self.model)
            self.power_ema.update(self.model)
        self.meter.add("grad_norm", norm)
        self.meter.end_step(healthy)
        self.guard.record(healthy, self.step, norm.item())

    def _log(self, numbers: dict[str, float]) -> dict[str, str]:
        """Writes the means since the last record and returns what the progress bar shows."""
        names, means = self.meter.means()
        means = cast(Tensor, self.accelerator.reduce(means, "mean")) if names else means
        timings = self.meter.timings(self.images_seen, self.accelerator.num_processes)
        record = {
            "step": self.step,
            "images_seen": self.images_seen,
            "epoch": self.images_seen / self.images_per_epoch,
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

    def _save(self, average: dict[str, Tensor], tracks: dict[Profile, dict[str, Tensor]]) -> None:
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
                self.write_models(folder, weights, average)
                write_snapshots(folder / TRACKS, self.step, tracks)

            state = position | self.describe()
            folder = step_folder(self.run_dir, self.step)
            write_checkpoint(folder, write_models, optimizer, processes, self.config_text, state)
            prune(self.run_dir, self.config.training.keep_last, self.config.training.keep_every)
        self.accelerator.wait_for_everyone()


def as_batch(items: Any) -> Batch:
    """Returns a batch: some data sets make it at once, others give its examples."""
    return items if isinstance(items, dict) else default_collate(items)


def share_of_batch(training: TrainingOptions, processes: int) -> int:
    """Returns the batch of one process and one accumulated part.

    Raises:
        ValueError: If the global batch cannot be shared evenly.
    """
    parts = processes * training.accumulation
    if training.global_batch_size % parts:
        raise ValueError(
            "training.global_batch_size must be a multiple of processes × accumulation, "
            f"got {training.global_batch_size} for {processes} × {training.accumulation}"
        )
    return training.global_batch_size // parts


def whole_norm(norm: Any) -> Tensor:
    """Returns the gradient norm as one number of the whole model, also where the gradients lie in shards."""
    norm = torch.as_tensor(norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def positions(
    start: int, updates: int, batch_size: int, accumulation: int, rank: int, ranks: int
) -> list[range]:
    """Returns the positions of each batch of one process, in order.

    Args:
        start: Images seen before.
        updates: Optimiser steps to come.
        batch_size: Images of one process in one accumulated part.
        accumulation: Parts of an optimiser step.
        rank: This process.
        ranks: How many processes there are.
    """
    parts = range(rank, updates * accumulation * ranks, ranks)
    return [range(start + part * batch_size, start + (part + 1) * batch_size) for part in parts]
