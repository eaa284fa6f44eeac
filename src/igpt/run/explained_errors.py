"""One line, with remedies, for errors of PyTorch and Lightning that a user can do something about."""

import re
import socket

import torch
import torch.distributed as dist

from igpt.distributed import ranks

OUT_OF_GPU_MEMORY = re.compile(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
OUT_OF_MEMORY = re.compile(r"can't allocate memory|^rank \d+: \w*MemoryError")


def explain_out_of_memory(error: BaseException) -> str | None:
    """A message with remedies if the error means that memory ran out (PyTorch raises several kinds); else None."""
    message, rank = str(error), ranks.this_rank()
    on_gpu = isinstance(error, torch.OutOfMemoryError) or OUT_OF_GPU_MEMORY.search(message) is not None
    if not on_gpu and not isinstance(error, MemoryError) and OUT_OF_MEMORY.search(message) is None:
        return None
    told = re.match(r"rank (\d+): ", message)  # by another rank
    here = "" if rank.count == 1 else f" of rank {rank.index} (on {socket.gethostname()})"
    what = "the GPU" if on_gpu else "the machine" if told else "this machine"
    return (
        f"the memory of {what}{f' of rank {told[1]}' if told else here} is full: the same command with "
        "trainer.plan=true says what a training run takes; trainer.micro_batch=N (fewer images at a time), "
        "trainer.activation_checkpointing=true, trainer.precision=bf16-mixed and trainer=fsdp take less; "
        "resume=RUN_FOLDER goes on from its newest checkpoint with these"
    )


def explain_lost_worker(error: BaseException) -> str | None:
    """A message with remedies if the error means that a DataLoader worker died; else None."""
    message = f"{error.__cause__ or error.__context__} {error}"  # PyTorch names the signal in the cause
    if re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)", message) is None:
        return None
    match = re.search(r"killed by signal: [\w ]+", message)
    how = match[0] if match else "it ended unexpectedly"
    return (
        f"a process that reads images has died ({how}): the system ends one that takes too much memory, or whose file "
        "became shorter; trainer.num_workers=0 reads in this process, and resume=RUN_FOLDER goes on"
    )


def explain_missing_metric(error: BaseException) -> str | None:
    """A message if a callback of Lightning's watches a metric that is not logged; else None."""
    is_missing = "conditioned on metric" in str(error)
    return f"callbacks: {' '.join(str(error).split())}" if is_missing else None


def explain_lost_rank(error: BaseException) -> str | None:
    """A message if the error means that another rank of this run has ended (gloo and NCCL raise several); else None.

    NCCL raises the same kind of error where its network or a GPU fails: the message has its words.
    """
    is_lost = isinstance(error, dist.DistError) or re.search(r"\bgloo\b|Connection (closed|reset) by peer", str(error))
    if ranks.this_rank().count == 1 or not is_lost:
        return None
    text = " ".join(str(error).partition("Exception raised from")[0].split())
    if "NCCL error" in text and "ncclRemoteError" not in text:
        return f"NCCL has failed, or another process of this run has ended: {text[:400]}; NCCL_DEBUG=WARN tells more"
    return "another process of this run has ended; this one ends, too, as it cannot go on alone"
