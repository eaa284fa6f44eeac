"""Settings of the hardware that a run uses: `conf/trainer/`."""

from typing import Annotated, Literal

from pydantic import Field

from igpt.settings.fields import Count, Settings

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
Strategy = Literal["ddp", "fsdp", "deepspeed_2", "deepspeed_3", "deepspeed_3_offload"]
AttentionBackend = Literal["auto", "native", "sdpa", "blocks", "bmm"]
DecodeBackend = Literal["auto", "native", "columns", "graphs", "layers"]
MatmulPrecision = Literal["auto", "highest", "high", "medium"]


class HardwareSettings(Settings):
    """All of it may change without changing what is learned, but for rounding."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Count | Literal["auto"]  # processes on each machine, on one GPU each; auto: however many were started
    nodes: Count  # machines
    strategy: Strategy  # of several processes: ddp (each holds all), fsdp or DeepSpeed's stages (each holds a part)
    checkpoint_in_pieces: bool | Literal["auto"]  # under fsdp: each process writes its part; auto: where it is large
    precision: Precision
    micro_batch: Count | None  # images per forward pass on one device; null: batch_size / devices
    compile: bool | Literal["auto"]  # torch.compile of every block; auto: where training is long enough to gain
    activation_checkpointing: bool
    attention: AttentionBackend
    matmul_precision: MatmulPrecision
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None  # processes that read images; null: on a GPU up to 4
    peak_tflops: Annotated[float, Field(ge=0.001, le=1e6)] | None  # of one device, to state utilisation against
    plan: bool = False  # only say what the run would take
    memory_gb: Annotated[float, Field(ge=0.001, le=1e6)] | None = None  # (plan) of one device; None: of what is here
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4  # (plan) the share of the peak that is expected
    decoding: DecodeBackend = "auto"  # how tokens are drawn one by one

    @property
    def shards(self) -> bool:
        """Whether what is trained lies in parts on all processes."""
        return self.strategy != "ddp"

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage of what lies in parts: 2 optimiser and gradients, 3 weights, too; 0: not by DeepSpeed."""
        return int(self.strategy.split("_")[1]) if self.strategy.startswith("deepspeed") else 0

    @property
    def offload(self) -> bool:
        """Whether weights and optimiser are kept in the host's memory, not the device's."""
        return self.strategy.endswith("offload")
