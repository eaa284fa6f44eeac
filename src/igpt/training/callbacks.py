"""Lightning callbacks to watch a training: grids of samples.

A callback declares by `is_observer = True` that it changes nothing in training; with its name in
`report/identity.py: OBSERVERS` it is no part of a run's identity. Any other callback is.
"""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from igpt.data.source import plain_pixels
from igpt.distributed import ranks
from igpt.metric.result import Grid
from igpt.model.generate import Sampling, generate
from igpt.report.bystanders import Bystander
from igpt.report.grid_pictures import grid_picture
from igpt.settings.fields import Count, Temperature
from igpt.tokens.datamodule import PixelDataModule, TokenDataModule
from igpt.training.frozen_networks import full_network
from igpt.training.loggers import save_picture
from igpt.utils import keyed


class SampleGrid(L.Callback):
    """Saves a grid of samples every `every` validations, always from the same random numbers, so grids compare.

    While a tokenizer is trained: its reconstructions of `count` validation images.
    """

    is_observer = True  # changes nothing in training

    def __init__(self, *, count: Count, every: Count, temperature: Temperature) -> None:
        self.count, self.every = count, every
        self.sampling = Sampling(temperature, None, None)
        self.bystander = Bystander("samples while it trains")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        passes = trainer.global_step * trainer.accumulate_grad_batches
        due = trainer.state.fn == "fit" and passes // int(trainer.val_check_interval or 1) % self.every == 0
        if not isinstance(data, TokenDataModule):
            assert isinstance(data, PixelDataModule)
            if due and trainer.is_global_zero:
                module: Any = pl_module  # a VQVAEModule
                rows = data.sample_rows("val", at_most=self.count).tolist()
                with self.bystander:
                    pixels = torch.from_numpy(plain_pixels(data.source.split("val"), rows))
                    save_grid(trainer, "reconstructions", module.draw_reconstructions(pixels))
            return
        trained: Any = pl_module  # with a network
        if due and trained.net.causal:
            with self.bystander:
                tokens = self.draw_samples(trained)
                if trainer.is_global_zero:
                    save_grid(trainer, "samples", data.decode(tokens))

    def draw_samples(self, module: Any) -> Tensor:
        """The samples of a module with a network `net`, each rank drawing a share of them: (N, T) on the CPU.

        Raises:
            RuntimeError: on every rank, if one has failed, for example for want of memory.
        """
        net, rank, machine = module.net, ranks.this_rank(), module.machine
        rng_keys = keyed.per_example_keys(keyed.key(0, "sample grid"), torch.arange(self.count))
        mine = keyed.uniform(rng_keys, net.n_ctx)[rank.index :: rank.count]

        def draw() -> Tensor:
            with machine.autocast():
                return generate(full, mine.to(module.device), self.sampling).cpu() if len(mine) else torch.empty(0)

        with full_network(net, machine.precision) as full:
            shares = ranks.all_gather_results(draw)
        tokens = torch.empty(self.count, net.n_ctx, dtype=torch.int64)
        for index, share in enumerate(shares[: self.count]):
            tokens[index :: rank.count] = share
        return tokens


def save_grid(trainer: L.Trainer, name: str, images: np.ndarray) -> None:
    """Writes images (N, R, R, 3) uint8 to `name/step_0001000.png` in the run directory, and to the loggers."""
    path = Path(trainer.default_root_dir) / name / f"step_{trainer.global_step:07d}.png"
    grid_picture(path, Grid.square(images))
    save_picture(trainer.loggers, name, path, trainer.global_step)
