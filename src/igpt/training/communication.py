"""Bytes that a device sends in an optimiser step, by strategy, and the seconds that they take."""

from dataclasses import dataclass

WIDE, NARROW = 4, 2  # bytes per float32, per bfloat16
GB = 1e9


@dataclass(frozen=True)
class Communication:
    """What one device sends to the others in a step (as much as it receives), and to and from host memory."""

    sent: float  # bytes
    to_host: float  # bytes over PCIe, both directions together
    bandwidth: float | None  # bytes a second that a device sends at most; None: not stated

    @property
    def seconds(self) -> float | None:
        """Seconds of a step if nothing else was done; those over PCIe are not counted. None without a bandwidth."""
        return None if self.bandwidth is None else self.sent / self.bandwidth

    @property
    def text(self) -> str:
        """`each device sends 10.59 GB a step, 0.030 s at 350 GB/s`; "" of one device without offload."""
        parts = []
        if self.sent:
            time = "not timed: state trainer.bandwidth_gbs"
            if self.bandwidth is not None:
                time = f"{self.seconds:,.3f} s at {self.bandwidth / GB:,.0f} GB/s"
            parts.append(f"each device sends {self.sent / GB:,.2f} GB a step, {time}")
        if self.to_host:
            parts.append(f"{self.to_host / GB:,.2f} GB a step to and from the machine's memory, not timed")
        return "; ".join(parts)


def count_sent_bytes(
    *, in_blocks: int, rest: int, strategy: str, precision: str, devices: int, passes: int
) -> tuple[float, float]:
    """Bytes that a device sends in a step: to the others, by rings, and to and from host memory.

    `in_blocks`, `rest`: weights in all blocks and outside of them. `passes`: forward and backward passes of a step.
    ddp reduces gradients once a step. fsdp gathers each block in each forward and each backward pass, in the precision
    that it computes in, the rest once a pass in its own, and reduces gradients once a step, in float32 where the
    weights are. ZeRO reduces gradients in each pass; stage 2 gathers weights once a step, stage 3 twice a pass.

    Sources: Rajbhandari et al. 2020, §7 (volumes); `training.fsdp` for the widths.
    """
    n = in_blocks + rest
    width = NARROW if precision == "bf16-true" else WIDE
    computed = WIDE if precision == "32-true" else NARROW
    share = (devices - 1) / devices  # of a tensor that a ring sends once around, from each device
    if strategy == "ddp":
        return share * 2 * width * n, 0.0
    if strategy == "fsdp":
        return share * (passes * (2 * computed * in_blocks + width * rest) + width * n), 0.0
    is_offloaded = strategy.endswith("offload")
    if strategy.startswith("deepspeed_2"):  # gradients to host memory, weights back
        return share * computed * n * (passes + 1), 2 * computed * n / devices if is_offloaded else 0.0
    return share * passes * 3 * computed * n, passes * 3 * computed * n / devices if is_offloaded else 0.0
