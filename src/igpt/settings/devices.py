"""Settings of the hardware that a run uses: `conf/trainer/`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from igpt.settings.fields import Count, Settings
from igpt.settings.lightning_arguments import LightningArguments

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
PrecisionChoice = Literal["auto", "32-true", "bf16-mixed", "bf16-true"]
Strategy = Literal["ddp", "fsdp", "deepspeed_2", "deepspeed_2_offload", "deepspeed_3", "deepspeed_3_offload"]
AttentionBackend = Literal["auto", "native", "sdpa", "blocks", "bmm", "flex"]
DecodeBackend = Literal["auto", "native", "columns", "graphs", "layers"]
Residual = Literal["float32", "bfloat16"]
MatmulPrecision = Literal["auto", "highest", "high", "medium"]


class HardwareSettings(Settings):
    """Hardware settings; but for some in `lightning`, they change a run's results only by rounding."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Count | Literal["auto"]  # processes per machine, one GPU each; auto: as many as were started
    nodes: Count  # machines
    strategy: Strategy  # ddp (replicated), fsdp or DeepSpeed's stages (sharded)
    sharded_checkpoint: bool | Literal["auto"]  # fsdp: each rank writes its shard; auto: for large networks
    precision: PrecisionChoice  # auto: by the device (`training.precision.resolve_precision`)
    micro_batch: Count | None  # images per forward pass on one device; null: batch_size / devices
    compile: bool | Literal["auto"]  # torch.compile every block; auto: if training is long enough to gain
    activation_checkpointing: bool
    attention_backend: AttentionBackend
    matmul_precision: MatmulPrecision
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None  # DataLoader workers; null: on a GPU up to 4
    peak_tflops: Annotated[float, Field(ge=0.001, le=1e6)] | None  # of one device, for the reported utilisation
    plan: bool = False  # only report what the run would cost
    memory_gb: Annotated[float, Field(ge=0.001, le=1e6)] | None = None  # (plan) of one device; None: of this machine
    residual: Residual = "float32"  # of the residual stream under bf16-mixed
    utilisation: Annotated[float, Field(gt=0, le=1)] | None = None  # (plan) share of peak_tflops; None: assumed
    bandwidth_gbs: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None  # (plan) that a device sends; None: not timed
    decoding: DecodeBackend = "auto"  # how tokens are sampled one by one
    lightning: LightningArguments = LightningArguments()  # further arguments of Lightning's Trainer

    @model_validator(mode="after")
    def _check_together(self) -> "HardwareSettings":
        """Raises ValueError for settings that exclude each other on any hardware."""
        clipped = self.lightning.gradient_clip_algorithm == "value"
        for setting, is_chosen in {
            "trainer.compile=true": self.compile is True,
            "trainer.precision=bf16-true": self.precision == "bf16-true",
            "trainer.lightning.gradient_clip_algorithm=value": clipped,
        }.items():
            if self.zero_stage and is_chosen:
                raise ValueError(
                    f"trainer={self.strategy} does not go with {setting}: DeepSpeed hangs its own hooks on every "
                    "layer, keeps float32 weights beside bfloat16 ones (bf16-mixed) and clips by norm: leave it "
                    "out, or choose trainer=fsdp"
                )
        if self.sharded_checkpoint is True and not self.is_sharded:
            raise ValueError(
                "trainer.sharded_checkpoint=true has each process write its shard, under trainer=ddp and on one device "
                "there are none: leave it at auto, or take trainer=fsdp"
            )
        if self.sharded_checkpoint is False and self.zero_stage:
            raise ValueError(
                f"trainer.sharded_checkpoint=false writes one file, trainer={self.strategy} a shard of each process: "
                "leave it at auto, or take trainer=fsdp"
            )
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether the training state is sharded over the ranks."""
        return self.strategy != "ddp"

    @property
    def zero_stage(self) -> int:
        """ZeRO stage: 2 shards optimiser and gradients, 3 weights, too; 0 without DeepSpeed."""
        return int(self.strategy.split("_")[1]) if self.strategy.startswith("deepspeed") else 0

    @property
    def is_offloaded(self) -> bool:
        """Whether optimiser state, under ZeRO 3 weights, too, is offloaded to host memory."""
        return self.strategy.endswith("offload")
