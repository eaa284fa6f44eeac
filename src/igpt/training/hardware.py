"""The machine a run uses: device, processes, precision, and what all of that means for a network."""

import ctypes
import importlib.util
import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from pydantic import model_validator
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from igpt.data.order import BatchPlan
from igpt.distributed.cores import count_cores
from igpt.distributed.process_state import float32_matmul_precision
from igpt.distributed.ranks import Rank, this_rank
from igpt.model import c_library, cpu, dispatch
from igpt.model.gpt import GPT
from igpt.model.verify import verify_attention
from igpt.settings.devices import HardwareSettings
from igpt.training.deepspeed import INSTALL

log = logging.getLogger(__name__)

DEEPSPEED_RUNS_ON = ("cuda",)  # its CPU accelerator is for tests


class Machine(HardwareSettings):
    """The hardware that a run uses, and what its settings mean for a network.

    Raises:
        ValueError: hardware, processes or a library that are not there, or settings that do not go together.
    """

    @model_validator(mode="after")
    def _check(self) -> "Machine":
        self._check_attention()
        self._check_decoding()
        if self.zero_stage and not self.plan:
            self._check_deepspeed()
        if self.strategy == "fsdp" and self.rank.count < 2 and not self.plan:
            raise ValueError(
                "trainer=fsdp shares a network out over several processes: trainer.devices=auto, or more than 1"
            )
        if self.accelerator == "gpu" and not self.plan and not torch.cuda.is_available():
            raise ValueError("trainer=gpu, but PyTorch sees no GPU here: choose trainer=cpu, or install a CUDA build")
        if self.plan:
            return self
        n_local = self.rank.n_local if self.devices == "auto" else self.devices
        if n_local * self.nodes != self.rank.count:
            raise ValueError(
                f"trainer.devices={self.devices} × trainer.nodes={self.nodes} asks for {n_local * self.nodes} "
                f"process(es), started: {self.rank.count}. On one machine `python train.py` starts them itself, on "
                "several torchrun or srun does, as many as the settings say"
            )
        if self.device.type == "cuda" and self.rank.local >= torch.cuda.device_count():
            raise ValueError(
                f"{self.rank.n_local} processes on this machine need as many GPUs, there are "
                f"{torch.cuda.device_count()}: lower trainer.devices, or choose trainer.accelerator=cpu"
            )
        return self

    @property
    def device(self) -> torch.device:
        """The device everything runs on: a GPU unless there is none or the CPU was asked for."""
        on_gpu = self.accelerator != "cpu" and torch.cuda.is_available()
        return torch.device("cuda", self.rank.local) if on_gpu else torch.device("cpu")

    @property
    def rank(self) -> Rank:
        """This process among those that carry the run."""
        return this_rank()

    @property
    def readers(self) -> int:
        """Processes that read images while this one trains."""
        if self.num_workers is not None:
            return self.num_workers
        return min(4, count_cores()) if self.device.type == "cuda" else 0

    def training_plan(self, batch_size: int) -> BatchPlan:
        """How `batch_size` images a step are shared out. Raises ValueError when they cannot be."""
        n = self.rank.count
        if batch_size % n:
            raise ValueError(
                f"task.batch_size {batch_size} cannot be shared by {n} processes: take a multiple of {n}, or another "
                "trainer.devices"
            )
        return BatchPlan(batch_size, self.micro_batch or batch_size // n, n_device=n, rank=self.rank.index)

    def reading_plan(self, batch_size: int) -> BatchPlan:
        """The same where nothing is learned: `batch_size` images at a time on each device, or fewer for its memory."""
        size, n = min(batch_size, self.micro_batch or batch_size), self.rank.count
        return BatchPlan(n * size, size, n_device=n, rank=self.rank.index)

    def prepare(self, net: GPT, *, flops: float = 0.0) -> None:
        """Applies what concerns the network: attention path, decoding, activation checkpointing, compilation.

        `flops`: of the training that is to come, on each device.
        """
        compiled = self.compile
        if compiled == "auto":
            half = self.precision != "32-true"
            gains = dispatch.pays_to_compile(self.device, n_embd=net.n_embd, flops=flops, half=half)
            compiled = gains and not self.zero_stage
        net.checkpointing, net.decoding = self.activation_checkpointing, self.decoding
        if self.attention == "native" and (lacking := net.blocks[0].attn.not_in_c):
            raise ValueError(f"trainer.attention=native does not compute {lacking}: choose auto")
        for block in net.blocks:
            block.attn.backend = self.attention
            if compiled:
                block.compile()

    def _check_attention(self) -> None:
        if self.attention != "native" or self.plan:
            return
        if self.device.type != "cpu":
            raise ValueError(
                f"trainer.attention=native is for a CPU, this would run on {self.device.type}: choose auto"
            )
        c_library.require_library("trainer.attention=native")

    def _check_decoding(self) -> None:
        if self.decoding in ("auto", "layers") or self.plan:
            return
        if self.shards:
            raise ValueError(
                f"trainer.decoding={self.decoding} reads whole weights, trainer={self.strategy} shares them out: "
                "choose auto"
            )
        if self.decoding == "native" and (self.device.type != "cpu" or self.precision == "bf16-true"):
            raise ValueError(
                "trainer.decoding=native reads float32 weights on a CPU, this is "
                f"{self.device.type} and trainer.precision={self.precision}: choose auto"
            )

    def _check_deepspeed(self) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(INSTALL)
        if self.device.type not in DEEPSPEED_RUNS_ON:
            raise ValueError(f"trainer={self.strategy} needs a CUDA GPU, this would run on the CPU: trainer=fsdp does")
        if self.rank.count < 2:
            raise ValueError(
                f"trainer={self.strategy} shares a network out over several processes: trainer.devices=auto, or more "
                "than 1; on one GPU trainer=gpu with trainer.activation_checkpointing=true takes the most"
            )
        if self.precision == "bf16-true" or self.compile is True:
            what = "trainer.compile=true" if self.compile is True else "trainer.precision=bf16-true"
            raise ValueError(
                f"trainer={self.strategy} does not go with {what}: DeepSpeed hangs its own hooks on every layer, and "
                "keeps float32 weights beside bfloat16 ones (bf16-mixed); trainer=fsdp takes both"
            )

    def made(
        self, build: Callable[[], GPT], fill: Callable[[GPT], None], mesh: DeviceMesh | None, *, flops: float
    ) -> GPT:
        """The network to train: `build` makes it, `fill` gives it its weights; `flops` as `prepare`.

        Sharded, it is made without memory, each block and the rest are cut into equal parts, one a process, and only
        the part that is here is given memory: no process ever holds it whole. Source: PyTorch's FSDP2.
        """
        if not self.shards or self.zero_stage:
            net = build()  # under ZeRO 3, DeepSpeed takes each weight apart as it is made
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
        for block in net.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(net, mesh=mesh["data_parallel"])
        for method in ("trunk", "step", "logits"):
            register_fsdp_forward_method(net, method)
        net.allocate(self.device)
        fill(net)
        return net

    @contextmanager
    def inference(self, net: GPT) -> Iterator[GPT]:
        """The network on this machine's device, at its precision, to draw from or to read, while the block lasts."""
        self.prepare(net)
        net = net.to(self.device).eval()
        if self.precision == "bf16-true":
            net = net.to(torch.bfloat16)
        with self.autocast():
            verify_attention(net)
            yield net

    def kernel_cache(self) -> AbstractContextManager[None]:
        """What keeps compiled kernels apart by kind of CPU while a block lasts, where any may be compiled."""
        return nullcontext() if self.compile is False else cpu.inductor_cache()

    def warn_of_rounding(self) -> None:
        """Warns, on the first rank, where an environment variable makes oneDNN round float32 at any setting."""
        setting = cpu.rounding_setting() if self.device.type == "cpu" else None
        if setting is not None and self.rank.first:
            log.warning(
                "%s: on a CPU with AMX, oneDNN then computes float32 in fewer bits, whatever trainer.precision and "
                "trainer.matmul_precision say; unset it for results that other machines repeat",
                setting,
            )

    def autocast(self) -> torch.autocast:
        """What makes `bf16-mixed` of a block, in the thread it runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")


@contextmanager
def matmul_precision(setting: str, device: torch.device) -> Iterator[None]:
    """float32 matrix products as `setting` says, while the block lasts.

    `auto`: `dispatch.matmul_precision`.
    """
    if setting == "auto":
        setting = dispatch.matmul_precision(device)
    with float32_matmul_precision(setting):
        yield


def hold_memory() -> None:
    """Keeps freed memory in this process instead of returning it to the system after every step (glibc only).

    The activations of each step are as large as those of the last; asking for them anew costs 2 to 16 % of a step on
    a CPU (`docs/performance.md`).
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
