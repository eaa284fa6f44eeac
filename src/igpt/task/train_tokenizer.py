"""`task=tokenizer`: trains a VQ-VAE, the tokenizer of later runs."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from igpt.checkpoint.find import find_vqvae
from igpt.checkpoint.igpt_format import check_equal
from igpt.data.source import plain_pixels
from igpt.distributed import ranks
from igpt.metric.reconstruction import SSIM_WINDOW, code_use_histogram
from igpt.metric.reconstruction import UNITS as OF_IMAGES
from igpt.metric.result import Number, Result
from igpt.run.components import Components
from igpt.settings.training import TokenizerTaskSettings
from igpt.task.reconstruction_score import (
    ReconstructionModule,
    ReconstructionScore,
    compare_with_patches,
    describe_collapse,
    draw_comparison,
)
from igpt.tokens.batches import Batch
from igpt.tokens.patches import K_MAX, PatchSettings
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer import Tokenizer
from igpt.tokens.tokenizer_registry import TOKENIZER, save_tokenizer
from igpt.tokens.vqvae import VQVAE, VQVAEConfig, init_weights, round_pixels, scale_pixels
from igpt.tokens.vqvae_tokenizer import VQVAETokenizer
from igpt.training.base_module import UNITS, TrainedModule
from igpt.training.checkpoint_callback import Checkpoints
from igpt.training.compiling import can_compile
from igpt.training.hardware import HardwareConfig
from igpt.training.hardware_checks import check_small_network
from igpt.training.optimizers import every_step, make_adam, warmup_stable_decay
from igpt.training.plan import count_vqvae_cost
from igpt.utils import keyed

log = logging.getLogger(__name__)

CROP = 7  # stream of the keys of crops
SHOWN = 8  # images
# k-means on patches: fewer iterations than tokens=patches takes, so that 4,096 codes take less than a minute
PATCHES: dict[str, Any] = {"n_patches": 200_000, "iterations": 20, "order": "raster", "seed": 0}


class VQVAEModule(TrainedModule):
    """Minimises the reconstruction error + commitment · the vectors' distance to their codes, on crops of the images.

    The codes are moving averages of the vectors, updated once per optimiser step. Source: van den Oord et al. 2017,
    eq. 3 and appendix A.1.
    """

    settings: TokenizerTaskSettings
    units: ClassVar = {
        **UNITS, **OF_IMAGES, "codes_used": "share", "perplexity_share": "share",
        **dict.fromkeys(("loss", "commitment"), OF_IMAGES["reconstruction"]),
    }  # fmt: skip

    def __init__(
        self, hardware: HardwareConfig, settings: TokenizerTaskSettings, config: VQVAEConfig, *, side: int, seed: int,
        n_val: int,
    ) -> None:  # fmt: skip
        self.crop = settings.crop or side  # pixels a side of the images trained on
        flops = count_vqvae_cost(config, self.crop).flops
        super().__init__(hardware, settings, flops_per_image=flops, n_ctx=(self.crop // config.factor) ** 2)
        self.config, self.seed = config, seed
        self.network = VQVAE(config)
        init_weights(self.network, seed)
        compiled = hardware.compile is True and can_compile(hardware.device, is_requested=True)
        for part in (self.network.encoder, self.network.decoder):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stub
            if compiled:
                part.compile()
        ranks.check_agree("weights to begin with", {"digest": ranks.hash_module(self.network)})
        self.score = ReconstructionScore(config.codes, n_val)
        self.is_alarmed = False

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_adam(self.network.parameters(), **self.settings.adam)
        warmup_steps, decay_share = self.settings.warmup_steps, self.settings.decay_share
        schedule = partial(warmup_stable_decay, warmup_steps=warmup_steps, decay_share=decay_share, ends=(self.steps,))
        return every_step(LambdaLR(optimizer, schedule))

    def measure_error(self, images: Tensor, target: Tensor) -> Tensor:
        """The reconstruction error of each image, `l2` or `l1` in [-1, 1]: 2 × (B, 3, R, R) → (B,)."""
        difference = images.float() - target
        return (difference.abs() if self.config.loss == "l1" else difference.square()).mean((1, 2, 3))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        pixels, rng_keys = batch.tokens, batch.rng_keys  # (B, R, R, 3) uint8, (B,)
        target = scale_pixels(crop_pixels(pixels, rng_keys, side=self.crop, multiple=self.config.factor))
        images, quantized = self.network(target, rng_keys)
        error = self.measure_error(images, target).mean()
        loss = error + self.config.commitment * quantized.commitment
        return self.accumulate(loss, {"loss": loss, "reconstruction": error, "commitment": quantized.commitment})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Updates the codes, after the base class has refused a loss that is not finite and set `updated_to`."""
        super().on_before_optimizer_step(optimizer)
        config = self.config
        self.network.quantizer.update(
            seed=self.seed, step=self.updated_to, decay=config.decay, unquantised_steps=config.unquantised_steps,
            restart_below=config.restart_below,
        )  # fmt: skip

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and images of the network as it is, in float32: (B, R, R, 3) uint8 → (B, T), (B, 3, R, R).

        Before the codes have started, all of them are zero.
        """
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            latents = self.network.encoder(scale_pixels(pixels)).permute(0, 2, 3, 1)  # (B, n, n, D)
            vectors = latents.flatten(0, 2)
            tokens = self.network.quantizer.nearest(vectors, vectors.new_zeros(len(vectors))).tokens
            tokens = tokens.view(latents.shape[:3])
            codes = self.network.quantizer.lookup(tokens).permute(0, 3, 1, 2)
            return tokens.flatten(1), self.network.decoder(codes)

    def draw_reconstructions(self, pixels: Tensor) -> np.ndarray:
        """Images of the network as it is, on the CPU: (B, R, R, 3) uint8 → the same."""
        _, images = self.reconstruct(pixels.to(self.device))
        drawn: np.ndarray = round_pixels(images).cpu().numpy()
        return drawn

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not len(batch.rows):  # the last batch of a rank may be empty
            return
        tokens, images = self.reconstruct(batch.tokens)
        error = self.measure_error(images, scale_pixels(batch.tokens))
        self.score.add(batch, tokens, round_pixels(images), {"reconstruction": error})

    def on_validation_epoch_end(self) -> None:
        numbers, _ = self.score.numbers("val", self.trainer)
        self.finish_validation(numbers, list(numbers))
        collapse = describe_collapse(numbers, self.config)
        if collapse and not self.is_alarmed and self.network.quantizer.has_codes:
            self.is_alarmed = True
            log.warning("%s", collapse)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokenizer"] = self.config.model_dump()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = Path(self.trainer.ckpt_path or "")
        check_equal("tokenizer", checkpoint.get("tokenizer"), self.config.model_dump(), path)
        super().on_load_checkpoint(checkpoint)


def crop_pixels(pixels: Tensor, rng_keys: Tensor, *, side: int, multiple: int) -> Tensor:
    """A square of each image, at a multiple of `multiple` drawn by its key: (B, R, R, 3), (B,) → (B, S, S, 3)."""
    choices = (pixels.shape[1] - side) // multiple + 1
    if choices == 1:
        return pixels[:, :side, :side]
    first = (keyed.uniform(keyed.fold_in(rng_keys, CROP), 2) * choices).long() * multiple  # (B, 2)
    rows, columns = (first[:, axis, None] + torch.arange(side, device=pixels.device) for axis in (0, 1))  # (B, S)
    return pixels[torch.arange(len(pixels), device=pixels.device)[:, None, None], rows[:, :, None], columns[:, None]]


def run(components: Components, settings: TokenizerTaskSettings) -> Result:
    """Trains a tokenizer; writes `model/tokenizer.json` and `checkpoints/` to the run directory."""
    hardware, trained = components.hardware, components.vqvae_settings
    side = components.source.resolution
    check_settings(hardware, settings, trained, side=side)
    config = VQVAEConfig(**trained.model_dump(include=set(VQVAEConfig.model_fields)))
    if hardware.lightning.dev_steps is not None:
        config = config.model_copy(update={"unquantised_steps": 0})  # so that there are codes at the end
    order = PixelOrder.from_name(side // config.factor, trained.order)
    data = components.build_pixel_datamodule(plan=hardware.train_batch_layout(settings.batch_size))
    n_train, n_val = data.count_images(val_every=settings.val_every)
    beside = name_tokenizers(settings.compare_with, side=side)
    if n_val and side < SSIM_WINDOW:
        log.info("no SSIM: its window of %d pixels is larger than the images", SSIM_WINDOW)
    if settings.patches and n_val and config.codes > K_MAX:
        log.info("no row of k-means on patches: it takes at most %d codes", K_MAX)
    elif settings.patches and n_val:
        patches = PatchSettings(patch=config.factor, k=config.codes, **PATCHES)
        beside["patches"] = ranks.broadcast_from_rank0(lambda: patches.build(data.source, components.cache_dir))
    ranks.check_agree(
        "images", {"train": n_train, "val": n_val} | {name: tokenizer.hash for name, tokenizer in beside.items()}
    )
    runner = components.runner  # which starts the loggers
    module = VQVAEModule(hardware, settings, config, side=side, seed=components.seed, n_val=n_val)
    saving = Checkpoints(
        runner.folder, settings, module.guard, keep=settings.checkpoint_keep, val_every=settings.val_every,
        monitor="val/psnr", highest=True,
    )  # fmt: skip
    progress = runner.fit(module, data, settings, saving, gradient_clip=settings.gradient_clip)
    if not module.network.quantizer.has_codes:
        raise ValueError(
            f"the training ended at step {progress.step}, before tokens.unquantised_steps={config.unquantised_steps}: "
            "there are no codes"
        )
    tokenizer = VQVAETokenizer(module.network, side, order)
    if hardware.rank.is_first:
        save_tokenizer(runner.folder / "model" / TOKENIZER, tokenizer)
    n_weight, seen = sum(weight.numel() for weight in module.network.parameters()), progress.step * settings.batch_size
    result = Result(
        numbers={"parameters": Number(n_weight, "weights", 1), "train/images_seen": Number(seen, "images", seen)},
        curves=module.curves(),
        files={"model": Path("model"), "checkpoints": Path("checkpoints")},
        provenance={
            "step": progress.step,
            "seed": components.seed,
            "tokenizer": tokenizer.hash,
            "beside": {name: other.hash for name, other in beside.items()},
            **progress.provenance,
        },
    )
    if n_val:
        numbers: dict[str, Number] = {}
        for name, each in {"val": tokenizer, **beside}.items():
            measured = ReconstructionModule(each, name=name, n_image=n_val)
            runner.validate(measured, data)
            numbers |= measured.numbers
            result.curves[f"{name}/code_use"] = code_use_histogram(measured.counts)
        result.numbers = numbers | result.numbers
        pixels = plain_pixels(data.source.split("val"), data.sample_rows("val", at_most=SHOWN).tolist())
        result.grids["reconstructed_images"] = draw_comparison(pixels, {"this run": tokenizer, **beside})
        found = describe_collapse(numbers, config), compare_with_patches(numbers, factor=config.factor)
        if warning := "; ".join(each for each in found if each):
            result.provenance["warning"] = warning
            log.warning("%s", warning)
    return result


def check_settings(
    hardware: HardwareConfig, settings: TokenizerTaskSettings, config: VQVAEConfig, *, side: int
) -> None:
    """Raises ValueError for settings that do not fit each other, the images of `side` pixels or this task."""
    check_small_network(hardware)
    crop, factor = settings.crop or side, config.factor
    if crop > side:
        raise ValueError(f"task.crop={crop} is more than the {side} pixels of the images: task.crop=null takes all")
    if crop % factor:
        raise ValueError(f"tokens.factor={factor} does not divide task.crop={crop}: take a multiple of it")
    has_start = config.quantizer == "ema"
    if has_start and (n_vector := settings.batch_size * (crop // factor) ** 2) < config.codes:
        raise ValueError(
            f"tokens.codes={config.codes} are more than the {n_vector:,} vectors of a step, from which they begin "
            f"(task.batch_size={settings.batch_size} × ({crop} / {factor})²): lower them, or raise task.batch_size"
        )
    if has_start and settings.steps <= config.unquantised_steps:
        raise ValueError(
            f"task.steps={settings.steps} end before the codes begin, after tokens.unquantised_steps="
            f"{config.unquantised_steps}: raise the one, or lower the other"
        )


def name_tokenizers(folders: list[str], *, side: int) -> dict[str, Tokenizer]:
    """The VQ-VAEs of runs by their loss (`vqvae_l1`), numbered where several are alike.

    Raises:
        ValueError: no tokenizer there, or one of another resolution.
    """
    named: dict[str, Tokenizer] = {}
    for folder in folders:
        tokenizer = find_vqvae(folder, setting="task.compare_with")
        if tokenizer.side != side:
            raise ValueError(
                f"task.compare_with: {folder} is of {tokenizer.side}×{tokenizer.side} pixels, data gives {side}×{side}"
            )
        name = f"vqvae_{tokenizer.config.loss}"
        alike = sum(other.partition("-")[0] == name for other in named)
        named[f"{name}-{alike + 1}" if alike else name] = tokenizer
    return named
