"""Hardware of a run: device, processes, precision, and how a network is built and prepared for them."""

import ctypes
import importlib.util
import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from pydantic import model_validator
from torch.distributed.device_mesh import DeviceMesh

from igpt.data.order import BatchPlan
from igpt.distributed.cores import count_cores
from igpt.distributed.gpus import gpu_index
from igpt.distributed.process_state import cudnn_tf32, float32_matmul_precision
from igpt.distributed.ranks import Rank, this_rank
from igpt.model import c_library, cpu, dispatch
from igpt.model.block import IN_C
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.model.patterns import SPARSE, Pattern
from igpt.model.verify import verify_attention
from igpt.settings.devices import HardwareSettings, Precision
from igpt.training import compiling
from igpt.training.deepspeed import INSTALL
from igpt.training.frozen_networks import build_on_meta, shard_frozen_network
from igpt.training.fsdp import shard_network
from igpt.training.hardware_checks import check_processes
from igpt.training.precision import resolve_precision

log = logging.getLogger(__name__)

DEEPSPEED_RUNS_ON = ("cuda",)  # tests add its CPU accelerator


class HardwareConfig(HardwareSettings):
    """Hardware settings, checked against this machine and applied to networks.

    Raises:
        ValueError: missing hardware, processes or library, or settings that exclude each other.
    """

    precision: Precision  # resolved

    @model_validator(mode="before")
    @classmethod
    def _resolve_precision(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "precision": resolve_precision(settings)} if "precision" in settings else settings

    @model_validator(mode="after")
    def _check(self) -> "HardwareConfig":
        if self.plan:
            return self
        if self.attention_backend == "native":
            if self.device.type != "cpu":
                raise ValueError(
                    f"trainer.attention_backend=native is for a CPU, this would run on {self.device.type}: choose auto"
                )
            c_library.require_library("trainer.attention_backend=native")
        if self.attention_backend == "flex" and self.device.type != "cuda":
            raise ValueError(
                f"trainer.attention_backend=flex is for a CUDA GPU, this would run on {self.device.type}: choose auto"
            )
        if self.decoding not in ("auto", "layers"):
            self._check_decoding()
        if self.strategy == "fsdp" and self.rank.count < 2:
            raise ValueError(
                "trainer=fsdp shares a network out over several processes: trainer.devices=auto, or more than 1"
            )
        check_processes(self, self.rank, self.device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of this rank: a GPU, or the CPU if chosen or if there is no GPU."""
        on_gpu = self.accelerator != "cpu" and torch.cuda.is_available()
        return torch.device("cuda", gpu_index(self.rank)) if on_gpu else torch.device("cpu")

    @property
    def rank(self) -> Rank:
        """The rank of this process."""
        return this_rank()

    @property
    def n_reader(self) -> int:
        """Number of DataLoader workers."""
        if self.num_workers is not None:
            return self.num_workers
        return min(4, count_cores()) if self.device.type == "cuda" else 0

    def train_batch_layout(self, batch_size: int) -> BatchPlan:
        """How `batch_size` images per step are split over devices. Raises ValueError if they do not divide evenly."""
        n = self.rank.count
        if batch_size % n:
            raise ValueError(
                f"task.batch_size {batch_size} cannot be shared by {n} processes: take a multiple of {n}, or another "
                "trainer.devices"
            )
        return BatchPlan(batch_size, self.micro_batch or batch_size // n, n_device=n, rank=self.rank.index)

    def eval_batch_layout(self, batch_size: int) -> BatchPlan:
        """How evaluation reads images: `batch_size` per device and batch, or `micro_batch` if that is smaller."""
        size, n = min(batch_size, self.micro_batch or batch_size), self.rank.count
        return BatchPlan(n * size, size, n_device=n, rank=self.rank.index)

    def prepare(self, net: GPT, *, flops: float = 0.0) -> None:
        """Sets the network's attention backend, decoding, activation checkpointing, stream and compilation.

        `flops`: operations per device of the training to come, by which `compile=auto` decides.
        """
        self.check_network(net.config)
        net.checkpointing, net.decoding = self.activation_checkpointing, self.decoding
        net.set_residual(torch.bfloat16 if self.residual == "bfloat16" else None)
        for block in net.blocks:
            block.attn.backend = self.attention_backend
        wanted = self.compile
        if wanted == "auto":
            half = self.precision != "32-true"
            gains = dispatch.is_worth_compiling(self.device, n_embd=net.n_embd, flops=flops, half=half)
            wanted = gains and not self.zero_stage
        if wanted and compiling.can_compile(self.device, is_requested=self.compile is True):
            compiling.compile_blocks(net)

    def check_network(self, network: GPTConfig) -> None:
        """Raises ValueError if the chosen attention backend or precision does not compute this network."""
        if self.residual == "bfloat16" and self.precision == "32-true":
            raise ValueError(
                "trainer.residual=bfloat16 is for trainer.precision=bf16-mixed (bf16-true has it), this computes in "
                "float32: leave it out, or choose that precision"
            )
        backend, patterns, lacking = self.attention_backend, network.patterns, ""
        if backend in ("native", "flex"):
            lacking = network.unsupported(IN_C)
        elif backend == "blocks" and network.relative_bias:
            lacking = "relative_bias=True"
        if lacking:
            raise ValueError(f"trainer.attention_backend={backend} does not compute {lacking}: choose auto")
        if backend != "auto" and "linear" in patterns:
            raise ValueError(
                f"trainer.attention_backend={backend} computes attention scores, model.attention=linear has none: "
                "choose auto"
            )
        if backend == "flex" and not any(isinstance(pattern, Pattern) for pattern in patterns):
            raise ValueError(
                f"trainer.attention_backend=flex is for model.attention={', '.join(SPARSE)}, this network has none "
                "of these: choose auto"
            )

    def _check_decoding(self) -> None:
        is_narrow = self.precision == "bf16-true" or (self.is_sharded and self.precision == "bf16-mixed")
        if self.decoding == "native" and (self.device.type != "cpu" or is_narrow):
            raise ValueError(
                "trainer.decoding=native reads float32 weights on a CPU, this is "
                f"{self.device.type} and trainer.precision={self.precision} under {self.strategy}: choose auto"
            )

    def check_training(self) -> None:
        """Raises ValueError if a network cannot be trained here; under DeepSpeed's strategies it may only be read."""
        if not self.zero_stage:
            return
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(INSTALL)
        if self.device.type not in DEEPSPEED_RUNS_ON:
            raise ValueError(f"trainer={self.strategy} trains on CUDA GPUs, this would run on a CPU: trainer=fsdp does")
        if self.rank.count < 2 and not self.is_offloaded:
            raise ValueError(
                f"trainer={self.strategy} shares a network out over several processes: trainer.devices=auto, or more "
                "than 1; on one GPU trainer=deepspeed_2_offload keeps the optimiser in the machine's memory, "
                "deepspeed_3_offload the weights, too"
            )

    def build_model(
        self, build: Callable[[], GPT], fill: Callable[[GPT], None], mesh: DeviceMesh | None, *, flops: float
    ) -> GPT:
        """The network to train: `build` creates it, `fill` sets its weights; `flops` as in `prepare`.

        Under FSDP it is created on the meta device and sharded block by block, and only the local shard is allocated:
        no process ever holds the full network.
        """
        if not self.is_sharded or self.zero_stage:
            net = build()  # under ZeRO 3, DeepSpeed shards each weight at creation
            fill(net)
            self.prepare(net, flops=flops)
            if not self.zero_stage:
                with self.autocast():
                    verify_attention(net)
            return net
        assert mesh is not None
        with torch.device("meta"):
            net = build()
        self.prepare(net, flops=flops)
        shard_network(net, mesh["data_parallel"], mixed=self.precision == "bf16-mixed")
        net.allocate(self.device)
        fill(net)
        return net

    def build_frozen(self, build: Callable[[], GPT], fill: Callable[[GPT], None]) -> GPT:
        """A network to read, in eval mode and without gradients: `build` creates it, `fill` sets its weights.

        Under FSDP and DeepSpeed it is sharded over all ranks, which must run the same forward passes, and no process
        ever holds all of it; else it is whole on this rank's device.
        """
        sharded = self.is_sharded and self.rank.count > 1
        net = build_on_meta(build, precision=self.precision, narrow=sharded)
        self.prepare(net)
        if sharded:
            shard_frozen_network(net, self.device)
        net.allocate(self.device)
        fill(net)
        return net

    @contextmanager
    def inference(self, build: Callable[[], GPT], fill: Callable[[GPT], None]) -> Iterator[GPT]:
        """Context manager: a network as of `build_frozen`, but whole on every rank, at the run's precision.

        Under FSDP and DeepSpeed with bf16-mixed its matrices are bfloat16, which takes half the memory.
        """
        net = build_on_meta(build, precision=self.precision, narrow=self.is_sharded)
        self.prepare(net)
        net.allocate(self.device)
        fill(net)
        with self.autocast():
            verify_attention(net)
            yield net

    def kernel_cache(self) -> AbstractContextManager[None]:
        """Context manager: a cache of compiled kernels per CPU type, unless `compile` is false."""
        return nullcontext() if self.compile is False else cpu.inductor_cache()

    def warn_of_rounding(self) -> None:
        """Warns, on rank 0, if an environment variable makes oneDNN compute float32 at lower precision."""
        setting = cpu.rounding_setting() if self.device.type == "cpu" else None
        if setting is not None and self.rank.is_first:
            log.warning(
                "%s: on a CPU with AMX, oneDNN then computes float32 in fewer bits, whatever trainer.precision and "
                "trainer.matmul_precision say; unset it for results that other machines repeat",
                setting,
            )

    def autocast(self) -> torch.autocast:
        """Context manager: autocast to bfloat16 under `bf16-mixed`, in the current thread; else no effect."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")


@contextmanager
def matmul_precision(setting: str, device: torch.device) -> Iterator[None]:
    """Context manager: float32 matmul precision `setting`; `auto`: that of `dispatch.matmul_precision`.

    On a GPU, convolutions in float32 may round to TF32 exactly if products may, unlike by PyTorch's default.
    """
    chosen = dispatch.matmul_precision(device) if setting == "auto" else setting
    with ExitStack() as changed:
        changed.enter_context(float32_matmul_precision(chosen))
        if device.type == "cuda":
            changed.enter_context(cudnn_tf32(chosen != "highest"))
        yield


def disable_malloc_trim() -> None:
    """Keeps freed memory in this process instead of returning it to the system (glibc only).

    Every step needs as much memory for activations as the last; allocating it anew costs 2 to 16 % of a step on a CPU
    (`docs/performance.md`).
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
