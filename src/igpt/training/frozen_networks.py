"""Networks that are only evaluated."""

from collections.abc import Callable
from typing import Any

from igpt.model.gpt import GPT


def build_frozen(machine: Any, build: Callable[[], GPT], fill: Callable[[GPT], None]) -> GPT:
    """A network in eval mode without gradients on this rank's device."""
    net = build()
    fill(net)
    machine.prepare(net)
    return net.to(machine.device).eval().requires_grad_(False)
