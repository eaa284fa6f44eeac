"""A training step of `task=tokenizer` against a plain loop in PyTorch with the same network, and encoding.

    python benchmarks/tokenizer.py --rounds 3 --out tokenizer.json

Both train the VQ-VAE of `--side`, `--crop`, `--batch` and `--hidden` from the same weights on the same crops of smooth
random images, with the same quantiser and fused Adam; their first losses must agree, or there are no figures. The
task's row is its own: Lightning, DataModule, log lines. The plain row is what one would first write. The first steps,
with the k-means start, are not timed. Encoding is that of the tokenizer, whole images.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import machine
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.data.order import InfiniteBatchSampler
from igpt.data.source import ArraySplit
from igpt.distributed.process_state import float32_matmul_precision
from igpt.run.components import Components
from igpt.run.launch import build_components
from igpt.run.targets import task_settings
from igpt.task.train_tokenizer import VQVAEModule, crop_pixels
from igpt.tokens.batches import PixelBatches
from igpt.tokens.datamodule import PixelDataModule
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.vqvae import VQVAE, VQVAEConfig, init_weights, scale_pixels
from igpt.tokens.vqvae_tokenizer import VQVAETokenizer
from igpt.training.checkpoint_callback import Checkpoints
from igpt.training.hardware import disable_malloc_trim
from igpt.training.trainer import Runner

CONF = Path(__file__).parents[1] / "conf"
IMAGES = 64
UNTIMED = 3  # steps at the start
AGREE = {"fp32": 1e-4, "bf16": 1e-2}  # of the losses of the untimed steps


def smooth_images(side: int) -> np.ndarray:
    """Random images of colours that change slowly, (IMAGES, side, side, 3) uint8."""
    coarse = torch.rand(IMAGES, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0)) * 255
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 255)
    return fine.round().byte().permute(0, 2, 3, 1).contiguous().numpy()


class Watch(L.Callback):
    """The time at the end of every step, and the losses of the untimed ones."""

    def __init__(self) -> None:
        self.step_times: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        if len(self.losses) < UNTIMED:
            self.losses.append(outputs["loss"].item())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.step_times.append(time.perf_counter())


class Training:
    """The settings of the task, and its two ways of training."""

    def __init__(self, components: Components, images: np.ndarray) -> None:
        self.components, self.hardware = components, components.hardware
        task = components.run.config["task"]
        self.settings: Any = task_settings(task["_target_"], task)
        chosen = components.vqvae_settings.model_dump(include=set(VQVAEConfig.model_fields))
        self.config = VQVAEConfig(**chosen)
        self.split = ArraySplit(images, np.zeros(len(images), dtype=np.int64))
        self.side = images.shape[1]

    def run_task(self) -> tuple[float, list[float]]:
        """Seconds per step, and the losses of the untimed steps."""
        watch = Watch()
        source: Any = SimpleNamespace(
            name="smooth", resolution=self.side, split=lambda name: self.split, training=lambda: self.split
        )
        with tempfile.TemporaryDirectory() as folder:
            module = VQVAEModule(self.hardware, self.settings, self.config, side=self.side, seed=0, n_val=0)
            plan = self.hardware.train_batch_layout(self.settings.batch_size)
            data = PixelDataModule(source=source, seed=0, num_workers=self.hardware.n_reader, plan=plan)
            saving = Checkpoints(Path(folder), self.settings, module.guard, keep=1, val_every=0, monitor="val/psnr")
            runner = Runner(machine=self.hardware, folder=Path(folder), callbacks=[watch])
            runner.fit(module, data, self.settings, saving)
        return (watch.step_times[-1] - watch.step_times[UNTIMED - 1]) / (len(watch.step_times) - UNTIMED), watch.losses

    def run_plain(self) -> tuple[float, list[float]]:
        """The same, of a plain loop."""
        settings, config, device = self.settings, self.config, self.hardware.device
        order = iter(
            InfiniteBatchSampler(
                len(self.split), plan=self.hardware.train_batch_layout(settings.batch_size), seed=0, first_step=0
            )
        )
        batches = PixelBatches(self.split, seed=0, stream="train")
        network = VQVAE(config)
        init_weights(network, 0)
        network.to(device)
        optimizer = torch.optim.Adam(
            network.parameters(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True
        )
        losses: list[float] = []
        start = 0.0
        with float32_matmul_precision("highest"):
            for step in range(1, settings.steps + 1):
                batch = batches.__getitems__(next(order))
                keys = batch.rng_keys.to(device)
                images = scale_pixels(
                    crop_pixels(batch.tokens.to(device), keys, side=settings.crop, multiple=config.factor)
                )
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * min(1.0, step / settings.warmup_steps)
                with self.hardware.autocast():
                    drawn, quantized = network(images, keys)
                loss = F.mse_loss(drawn.float(), images) + config.commitment * quantized.commitment
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                network.quantizer.update(
                    seed=0, step=step, decay=config.decay, unquantised_steps=config.unquantised_steps,
                    restart_below=config.restart_below,
                )  # fmt: skip
                optimizer.step()
                losses.append(loss.item())
                if step == UNTIMED:
                    start = time.perf_counter()
        return (time.perf_counter() - start) / (settings.steps - UNTIMED), losses[:UNTIMED]


def encode(training: Training, n: int) -> machine.Run:
    """What encodes n images with a codebook of vectors of the encoder."""
    network, config = VQVAE(training.config), training.config
    init_weights(network, 0)
    pixels = torch.from_numpy(training.split.pixels[:n]).to(training.hardware.device)
    network.to(pixels.device)
    with torch.no_grad():
        vectors = network.encoder(scale_pixels(pixels)).permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[: config.codes]
        network.quantizer.codebook.copy_(vectors[chosen.to(pixels.device)])
    order = PixelOrder.from_name(training.side // config.factor, "raster")
    tokenizer = VQVAETokenizer(network, training.side, order)

    def run() -> Tensor:
        return tokenizer.encode(pixels)

    return machine.with_timer(run)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=96, help="pixels a side")
    parser.add_argument("--crop", type=int, default=48, help="pixels a side of what is trained on")
    parser.add_argument("--batch", type=int, default=16, help="images of a step")
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of which the first are not timed")
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    disable_malloc_trim()
    images, rates = smooth_images(args.side), {}
    report: dict[str, Any] = {"images_per_s": rates}
    print(machine.about())
    for label in args.precision:
        components = build_components(
            "task=tokenizer", "data=digits", "trainer=auto", f"tokens.codes={args.codes}", "tokens.unquantised_steps=1",
            f"tokens.hidden={args.hidden}", f"task.steps={args.steps}", f"task.batch_size={args.batch}",
            f"task.crop={args.crop}", "task.val_every=0", "task.log_every=10", "task.checkpoint_every=1000000",
            f"task.warmup_steps={args.steps - 1}",
            f"trainer.precision={'bf16-mixed' if label == 'bf16' else '32-true'}", conf=CONF,
        )  # fmt: skip
        training = Training(components, images)
        times = machine.time_in_turns(
            {"plain loop": training.run_plain, "task=tokenizer": training.run_task}, args.rounds
        )
        machine.agree("the loss", times, lambda name, label=label: AGREE[label])
        for name, row in times.items():
            rates[f"{name} {label}"] = args.batch / row.median
        print(f"{label}, {args.batch} crops of {args.crop} pixels, {args.codes} codes:")
        print("\n".join(machine.table(times, unit=lambda s: f"{args.batch / s:,.0f} images/s", against="plain loop")))
    n = min(IMAGES, 32)
    times = machine.time_in_turns({"encoding": encode(training, n)}, args.rounds)
    rates["encoding"] = n / times["encoding"].median
    print("\n".join(machine.table(times, unit=lambda s: f"{n / s:,.0f} images/s", against="encoding")))
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
