"""The Trainer: builds everything, checks it, then runs the loop. The room that speaks Accelerate."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from flashdit.config import RunConfig, changes, to_yaml
from flashdit.encode import open_latents
from flashdit.files import write_atomically, write_json
from flashdit.flow.loss import flow_loss
from flashdit.flow.path import interpolate, velocity
from flashdit.flow.times import TIMES
from flashdit.generate import ImageGenerator
from flashdit.models.dit import FlashDiT
from flashdit.pictures import labelled_grid, rows_by_class
from flashdit.training.checkpoint import FORMAT, list_checkpoints, read_state, read_weights, step_folder
from flashdit.training.ema import Ema
from flashdit.training.examples import Examples, positions
from flashdit.training.optim import learning_rate, make_optimizer
from flashdit.training.tracking import Tracker

logger = logging.getLogger(__name__)
# A (C, 1, 3, 3) gradient in channels-last order has other strides and the same memory: nothing is slower.
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
PREVIEW_CLASSES, PREVIEW_PER_CLASS = 10, 4
FIXED_ON_RESUME = ("seed", "data.", "latents.", "model.", "flow.")


class Trainer:
    """Trains one run: `Trainer(config).fit()`.

    Everything is built, loaded and checked before the first step. A run folder that holds checkpoints is
    resumed from the latest one.

    Args:
        config: The checked configuration.

    Raises:
        ValueError: If data, model and run folder do not fit together.
    """

    def __init__(self, config: RunConfig):
        self.config, training = config, config.training
        precision = "no" if training.precision == "fp32" else training.precision
        self.accelerator = Accelerator(
            mixed_precision=precision, gradient_accumulation_steps=training.accumulation
        )
        self.main = self.accelerator.is_main_process
        self.run_dir = Path(config.run.dir)
        self.batch_size = self._batch_size()
        checkpoints = list_checkpoints(self.run_dir)
        if checkpoints:
            self._check_unchanged(checkpoints[-1])
        torch.manual_seed(config.seed)
        self.model = FlashDiT(**config.model)
        self.data, self.space = open_latents(config.data, config.latents, self.accelerator.device, self.main)
        self.class_names = self.data.class_names or [str(i) for i in range(self.model.num_classes)]
        self._check_fit()
        if training.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        optimizer = make_optimizer(self.model.parameters(), config.optimizer)
        self.network, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.space.to(self.accelerator.device)
        self.ema = Ema(self.model, config.ema)
        self.step = self.images_seen = 0
        if checkpoints:
            self._resume(checkpoints[-1])

    def _batch_size(self) -> int:
        """Returns the batch of one process and one accumulated part."""
        training, processes = self.config.training, self.accelerator.num_processes
        parts = processes * training.accumulation
        if training.global_batch_size % parts:
            raise ValueError(
                "training.global_batch_size must be a multiple of processes × accumulation, "
                f"got {training.global_batch_size} for {processes} × {training.accumulation}"
            )
        return training.global_batch_size // parts

    def _check_unchanged(self, checkpoint: Path) -> None:
        """Refuses a resume with another model or other data; says what else has changed."""
        old = yaml.safe_load((checkpoint / "config.yaml").read_text())
        for key, (before, after) in changes(old, yaml.safe_load(to_yaml(self.config))).items():
            if key.startswith(FIXED_ON_RESUME):
                rule = f"{self.run_dir} holds a run whose {key} is {before}, not {after}"
                raise ValueError(f"{rule}: give another run.dir")
            if self.main and key != "run.dir":
                logger.info("resumed with another %s: %s, was %s", key, after, before)

    def _check_fit(self) -> None:
        """Raises ValueError unless the model takes these latents and labels."""
        shape, labels, num_classes = self.data.shape, self.data.labels, self.model.num_classes
        channels, side = (self.model.config[name] for name in ("in_channels", "sample_size"))
        if shape != (channels, side, side):
            raise ValueError(
                f"the data's latents must be what the model takes, model.in_channels={channels} and "
                f"model.sample_size={side}, got {' × '.join(map(str, shape))}"
            )
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"labels must be from 0 to below model.num_classes={num_classes}, got {lowest} to {highest}"
            )
        if self.data.class_names and len(self.data.class_names) != num_classes:
            count = len(self.data.class_names)
            raise ValueError(f"model.num_classes must be the data's {count} classes, got {num_classes}")

    def _resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint: weights, EMA, optimiser, loss scaler, position, random state."""
        state = read_state(checkpoint)
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.model.load_state_dict(read_weights(checkpoint / "model"))
        self.ema.load(read_weights(checkpoint / "ema"), state["ema_updates"])
        device, scaler = self.accelerator.device, self.accelerator.scaler
        saved = torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        if scaler is not None and saved["scaler"] is not None:
            scaler.load_state_dict(saved["scaler"])
        random_states = torch.load(checkpoint / "rng.pt", weights_only=True)
        if self.accelerator.process_index < len(random_states):
            torch.set_rng_state(random_states[self.accelerator.process_index])

    def fit(self) -> Path:
        """Trains to `training.steps` and returns the run's folder."""
        training = self.config.training
        if self.step >= training.steps:
            logger.info("%s is already at step %d of %d", self.run_dir, self.step, training.steps)
            return self.run_dir
        if self.main:
            write_atomically(self.run_dir / "config.yaml", lambda path: path.write_text(to_yaml(self.config)))
            self.tracker = Tracker(self.run_dir, self.config.tracking, asdict(self.config), self.step)
        self.network.train()
        self._reset_meter()
        batches = iter(self._batches())
        bar = tqdm(total=training.steps, initial=self.step, desc="train", unit="step", disable=not self.main)
        while self.step < training.steps:
            self._update(batches)
            bar.update()
            last = self.step == training.steps
            save = last or self.step % training.save_every == 0
            if save or self.step % training.log_every == 0:
                bar.set_postfix(self._log())
            if training.preview_every and (last or self.step % training.preview_every == 0):
                self._preview()
            if save:
                self._save()
        bar.close()
        if self.main:
            self.tracker.close()
        return self.run_dir

    def _batches(self) -> DataLoader:
        """Returns this process's batches from where the run stands to its end."""
        config, training, accelerator = self.config, self.config.training, self.accelerator
        times = TIMES.build(config.flow.times)
        sampler = positions(
            self.images_seen,
            training.steps - self.step,
            self.batch_size,
            training.accumulation,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return DataLoader(
            Examples(self.data, times, config.seed, self.model.class_dropout_prob),
            batch_sampler=cast(Any, sampler),
            num_workers=training.workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # its own: the global one stays where a resume would find it
        )

    def _update(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """Makes one optimiser step from its accumulated batches."""
        self.step += 1
        self.images_seen += self.config.training.global_batch_size
        options = self.config.optimizer
        self.lr = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        for _ in range(self.config.training.accumulation):
            with self.accelerator.accumulate(self.network):
                self.accelerator.backward(self._loss(next(batches)))
                if self.accelerator.sync_gradients and options.max_grad_norm is not None:
                    norm = self.accelerator.clip_grad_norm_(self.network.parameters(), options.max_grad_norm)
                    self._measure("grad_norm", cast(Tensor, norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.ema.update(self.model)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the mean loss of one batch."""
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        x_1, x_0, t = self.space.normalise(batch["latent"]), batch["noise"], batch["time"]
        with self.accelerator.autocast():
            v_t = self.network(interpolate(x_0, x_1, t), t, batch["label"], drop=batch["drop"])
        loss, terms = flow_loss(v_t, velocity(x_0, x_1), self.config.flow.loss)
        for name, value in {"loss": loss, **terms}.items():
            self._measure(name, value.mean() / self.config.training.accumulation)
        return loss.mean()

    def _measure(self, name: str, value: Tensor) -> None:
        """Adds a value to the meter; sums stay on the device until they are logged."""
        self.meter[name] = self.meter.get(name, 0) + value.detach()

    def _reset_meter(self) -> None:
        """Starts a new interval of the log."""
        self.meter: dict[str, Any] = {}
        self.meter_step, self.meter_time = self.step, time.perf_counter()

    def _log(self) -> dict[str, str]:
        """Writes the means since the last record and returns what the progress bar shows.

        A record is written at each checkpoint too, so that a resumed run starts with an empty meter.
        """
        updates = self.step - self.meter_step
        means = cast(Tensor, self.accelerator.reduce(torch.stack(list(self.meter.values())), "mean"))
        elapsed_s = time.perf_counter() - self.meter_time
        record = {
            "step": self.step,
            "images_seen": self.images_seen,
            "epoch": self.images_seen / len(self.data.labels),
            "lr": self.lr,
            **dict(zip(self.meter, (means / updates).tolist(), strict=True)),
            "images_per_s": updates * self.config.training.global_batch_size / elapsed_s,
        }
        if self.main:
            self.tracker.log(record)
        self._reset_meter()
        return {"loss": f"{record['loss']:.4f}", "images/s": f"{record['images_per_s']:.0f}"}

    def _ema_model(self) -> FlashDiT:
        """Returns a copy of the model with the averaged weights, in evaluation mode."""
        with torch.random.fork_rng():
            model = FlashDiT(**self.config.model)
        self.ema.copy_to(model)
        model.to(self.accelerator.device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return model.eval()

    def _preview(self) -> None:
        """Writes a grid of the EMA's samples with fixed seeds."""
        if not self.main or self.space.vae is None:
            return
        classes = torch.arange(min(PREVIEW_CLASSES, len(self.class_names)))
        labels = classes.repeat_interleave(PREVIEW_PER_CLASS)
        generator = ImageGenerator(self._ema_model(), self.space, self.class_names)
        images = torch.cat([batch.images for batch in generator.generate(labels, self.config.sampling)])
        title = f"step {self.step}, EMA, {self.config.sampling}"
        grid = labelled_grid(rows_by_class(images, labels, self.class_names, PREVIEW_PER_CLASS), title)
        path = self.run_dir / "samples" / f"step_{self.step:08d}.png"
        write_atomically(path, lambda temporary: grid.save(temporary, format="png"))

    def _save(self) -> None:
        """Writes a checkpoint; every process calls it, the main one writes."""
        random_states = gather_object([torch.get_rng_state()])
        if self.main:
            folder = step_folder(self.run_dir, self.step)
            write_atomically(folder, lambda path: self._write_checkpoint(path, random_states))
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, folder: Path, random_states: list[Tensor]) -> None:
        """Writes every part of a checkpoint into a folder."""
        folder.mkdir()
        self.model.save_pretrained(folder / "model")
        self._ema_model().save_pretrained(folder / "ema")
        self.space.save(folder / "latents.safetensors")
        scaler = self.accelerator.scaler
        states = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        torch.save(states, folder / "optimizer.pt")
        torch.save(random_states, folder / "rng.pt")
        (folder / "config.yaml").write_text(to_yaml(self.config))
        state = {
            "format": FORMAT,
            "step": self.step,
            "images_seen": self.images_seen,
            "ema_updates": self.ema.updates,
            "class_names": self.class_names,
            "data_name": self.config.data["name"],
            "sampling": asdict(self.config.sampling),
        }
        write_json(folder / "state.json", state)
