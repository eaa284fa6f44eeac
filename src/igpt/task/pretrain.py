"""`task=pretrain`: generative pretraining with the paper's recipe."""

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from igpt.checkpoint import igpt_format
from igpt.checkpoint.igpt_format import Weights, check_equal, meta_model, read_model, save_model
from igpt.checkpoint.resume import kept_path
from igpt.checkpoint.tensors import LazyTensor
from igpt.distributed import ranks
from igpt.metric.result import Number, Result
from igpt.metric.throughput import train_flops_per_image
from igpt.model.gpt import GPT
from igpt.objective.base import generative_loss
from igpt.run.components import Components
from igpt.settings.training import PretrainSettings
from igpt.task.generative_score import GenerativeScore, choose_units
from igpt.tokens.batches import Batch
from igpt.training.base_module import TrainedModule
from igpt.training.checkpoint_callback import Checkpoints
from igpt.training.deepspeed import full_state, release_training_state
from igpt.training.ema import WeightAverage
from igpt.training.frozen_networks import attach_frozen
from igpt.training.loss_by_position import NAME as LOSS_BY_POSITION
from igpt.training.loss_by_position import draw_loss_by_position
from igpt.training.optimizers import every_step, make_optimizer, make_scheduler
from igpt.training.plan import compare_memory
from igpt.utils import files

log = logging.getLogger(__name__)


class PretrainModule(TrainedModule):
    """Minimises a generative objective. Source of the defaults in `conf/task/pretrain.yaml`: Chen et al. 2020, §3.1."""

    settings: PretrainSettings

    def __init__(self, components: Components, settings: PretrainSettings, *, n_val: int) -> None:
        network = components.network
        super().__init__(
            components.hardware, settings, flops_per_image=train_flops_per_image(network), n_ctx=network.n_ctx
        )
        self.components = components
        self.objective, self.weights = components.objective, components.weights
        self.n_val = n_val  # validation images
        self.n_weight = sum(weight.numel() for weight in meta_model(components.network).parameters())
        self.n_shardable: int | None = self.n_weight
        self.score = GenerativeScore(self.objective, choose_units(components, "val"))
        self.score_of_average = GenerativeScore(self.objective)
        self.net: GPT | None = None
        self.average: WeightAverage | None = None  # of the weights, where there is `task.ema`
        self._saved_average: dict[str, Tensor | LazyTensor] | None = None  # of the checkpoint

    def configure_model(self) -> None:
        if self.net is not None:
            return
        mesh = getattr(self, "_device_mesh", None)
        self.net = self.machine.build_model(
            self.components.build_network, self._fill_weights, mesh, flops=self.flops_here
        )
        if not self.machine.is_sharded:
            ranks.check_agree("weights to begin with", {"digest": ranks.hash_module(self.net)})

    def load_frozen(self, weights: Weights) -> None:
        """After ZeRO training: replaces the network by a frozen one with the weights that were saved."""
        release_training_state(self)
        attach_frozen(self, self.machine.build_frozen(self.components.build_network, weights.load_into))
        self.n_shardable = None

    def _fill_weights(self, net: GPT) -> None:
        if self.weights is None:
            net.init_weights(self.components.seed)
        else:
            self.weights.load_into(net)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.net is not None
        settings = self.settings
        optimizer = make_optimizer(settings.optimizer, self.net, **settings.adam)
        schedule = make_scheduler(
            optimizer, warmup_steps=settings.warmup_steps, steps=self.steps, decay_share=settings.decay_share,
            cooled_at=settings.cooled_at,
        )  # fmt: skip
        return every_step(schedule)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.net is not None
        tokens, rng_keys = batch.tokens, batch.rng_keys  # (B, T), (B,)
        visible = self.objective.visible_mask(tokens, rng_keys)  # (B, T) tokens the net may see; None: all
        head = partial(generative_loss, self.objective, self.net, tokens=tokens, visible=visible)
        loss = self.net(tokens, visible, head)  # nats per token
        return self.accumulate(loss, {"loss_gen": loss})

    def on_fit_start(self) -> None:
        if self.settings.ema is not None:
            assert self.net is not None
            self.average = WeightAverage(self.net, self.settings.ema, self._saved_average)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            assert self.net is not None
            self.average.update(self.net, self.global_step)  # which counts this step later

    def on_train_start(self) -> None:
        super().on_train_start()
        self._keep_step()  # resumed here, and perhaps killed before they were kept

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._keep_step()

    def _keep_step(self) -> None:
        """Keeps the weights of this step if it is one of `keep_steps`; those of the last when training has ended."""
        if self.global_step in self.settings.keep_steps and self.global_step < self.steps:
            self.agree()
            self.keep_weights(self.global_step)

    def save_weights(self, step: int, model: Path, model_ema: Path) -> None:
        """Writes the weights, and their average if there is one, into these folders. All ranks must call it."""
        assert self.net is not None
        state = full_state(self.net) if self.machine.zero_stage else self.net.state_dict()
        metadata = self.components.checkpoint_metadata(step=step)
        save_model(model, state, metadata)
        if self.average is not None:
            save_model(model_ema, {**state, **self.average.weights}, metadata)

    def keep_weights(self, step: int) -> None:
        """Writes the weights of this step, for good, each folder atomically. All ranks must call it."""
        folder, first = self.components.runner.folder, ranks.this_rank().is_first
        kept = [kept_path(folder, step, average=average) for average in (False, True)]
        with ExitStack() as written:
            parts = [written.enter_context(files.temporary_folder(path)) if first else path for path in kept]
            self.save_weights(step, *parts)
            for part, path in zip(parts, kept, strict=True):
                if first and (part / igpt_format.CONFIG).is_file():
                    files.remove(path)  # of the same step, before the run was resumed from an earlier one
                    files.move_into_place(part, path)
        log.info("the weights of step %s are kept in init=%s", f"{step:,}", kept[0])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.net is not None
        self.score.add(self.net, batch)
        if self.average is not None:
            with self.average.average_parameters(self.net):
                self.score_of_average.add(self.net, batch)

    def on_validation_epoch_end(self) -> None:
        numbers = self.score.numbers("val", self.trainer, self.n_val)
        curves = ["val/loss_gen", *(f"val/{unit.key}" for unit in self.score.units)]
        if self.average is not None:
            of_average = self.score_of_average.numbers("val", self.trainer, self.n_val)
            numbers["val/loss_gen_ema"] = of_average["val/loss_gen"]
            curves.append("val/loss_gen_ema")
        self.finish_validation(numbers, curves)
        shown_to = [logger for logger in self.trainer.loggers if hasattr(logger, "log_image")]
        if self.trainer.state.fn == "fit" and shown_to:  # rank 0 has the loggers
            folder, step = self.components.runner.folder, self.global_step
            draw_loss_by_position(folder, self.loss_by_position, step=step, loggers=shown_to)

    @property
    def loss_by_position(self) -> np.ndarray:
        """Mean nats per token of each cell of the token grid in the last validation: (R, C)."""
        nats, tokenizer = self.score.by_position, self.components.tokenizer
        assert nats is not None
        cells = nats.view(-1, tokenizer.grid.channels).mean(1)  # (T,) → (cells,)
        grid: np.ndarray = tokenizer.order.unflatten(cells[None])[0].numpy()
        return grid

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["format"] = igpt_format.FORMAT
        checkpoint[igpt_format.METADATA_KEY] = self.components.checkpoint_metadata(step=self.global_step).to_dict()
        if self.average is not None:
            checkpoint["ema"] = dict(self.average.weights)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = Path(self.trainer.ckpt_path or "")
        saved, expected = igpt_format.extract_metadata(checkpoint, path), self.components.checkpoint_metadata(step=0)
        check_equal("network", saved.network.to_dict(), expected.network.to_dict(), path)
        check_equal("objective", saved.objective, expected.objective, path)
        check_equal("tokenizer", saved.tokenizer.hash, expected.tokenizer.hash, path)
        super().on_load_checkpoint(checkpoint)
        self._saved_average = checkpoint.get("ema")
        if self.average is not None and self._saved_average is not None:  # trainer=fsdp loads after `on_fit_start`
            self.average.load(self._saved_average)


def run(components: Components, settings: PretrainSettings) -> Result:
    """Trains a network; writes `model/` and `checkpoints/` to the run directory."""
    hardware = components.hardware
    if hardware.is_sharded:
        settings.check_sharded(hardware.strategy)
    data = components.build_datamodule(plan=hardware.train_batch_layout(settings.batch_size))
    n_train, n_val = data.count_images(val_every=settings.val_every)
    ranks.check_agree("images", {"train": n_train, "val": n_val, "tokenizer": data.tokenizer.hash})
    runner = components.runner  # which starts the loggers
    module = PretrainModule(components, settings, n_val=n_val)
    saving = Checkpoints(
        runner.folder, settings, module.guard, keep=settings.checkpoint_keep, val_every=settings.val_every,
        cooled_at=settings.cooled_at,
    )  # fmt: skip
    progress = runner.fit(module, data, settings, saving, gradient_clip=settings.gradient_clip)
    assert module.net is not None
    module.save_weights(progress.step, runner.folder / "model", runner.folder / "model_ema")
    if progress.step in settings.keep_steps:
        module.keep_weights(progress.step)
    averaged = {}
    if module.average is not None:
        averaged["model_ema"] = Path("model_ema")
        log.info("the averaged weights are in init=%s", runner.folder / "model_ema")
    if hardware.zero_stage:
        ranks.barrier()  # until rank 0 has written it
        module.load_frozen(read_model(runner.folder / "model"))
    pictures: dict[str, Path] = {}
    if n_val:
        runner.validate(module, data)
        if hardware.rank.is_first:
            picture = draw_loss_by_position(runner.folder, module.loss_by_position, step=progress.step)
            pictures |= {} if picture is None else {LOSS_BY_POSITION: picture}
    seen = progress.step * settings.batch_size
    planned = compare_memory(
        hardware, components.network, progress.peak_memory, batch_size=settings.batch_size,
        optimizer=settings.optimizer, has_average=settings.ema is not None,
    )  # fmt: skip
    return Result(
        numbers={
            **module.numbers,
            "parameters": Number(module.n_weight, "weights", 1),
            "train/images_seen": Number(seen, "images", seen),
            "train/operations": Number(module.flops_per_image * seen, "FLOP", seen),
            **({"train/step_seconds": seconds} if (seconds := module.timer and module.timer.number) else {}),
            "train/peak_memory": progress.peak_memory,
            **planned,
            **module.clock.numbers,
        },
        curves=module.curves(),
        files={"model": Path("model"), **averaged, "checkpoints": Path("checkpoints"), **pictures},
        provenance={
            "step": progress.step,
            "seed": components.seed,
            "tokenizer": data.tokenizer.hash,
            "train_images": n_train,
            **progress.provenance,
        },
    )
