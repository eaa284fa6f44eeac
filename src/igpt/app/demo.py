"""`task=demo`: what a person does with a trained network on a page. Nothing here knows the page itself."""

import importlib.util
import logging
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from igpt.app.nearest import TrainingFeatures
from igpt.app.workbench import MEBIBYTE, Uploads, Workbench
from igpt.checkpoint.native import Weights
from igpt.components import Components
from igpt.global_state import num_threads, signal_handler
from igpt.metric.result import Result
from igpt.report.folder import RunFolder, result_of
from igpt.settings.generation import DemoSettings
from igpt.task.complete import prompt_rows

log = logging.getLogger(__name__)

INSTALL = "task=demo needs Gradio, which is not installed here: pip install gradio==6.31.0 (or igpt[demo])"
LOCAL = ("127.0.0.1", "localhost", "::1")


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """So many threads for PyTorch, while the block lasts; None: one fewer than it would take.

    The threads that share a product wait for each other in a loop, so one that has to share its core with a browser
    holds up all of them: on two cores, two threads then draw several times slower than one (docs/demo.md).
    """
    with num_threads(max(1, torch.get_num_threads() - 1) if threads is None else threads):
        yield


def about(weights: Weights) -> dict[str, str]:
    """What the page says of the weights it shows."""
    metadata, loss = weights.metadata, validation_loss(weights)
    side = metadata.tokenizer.side
    sizes = f"{metadata.network.n_layer} blocks of {metadata.network.n_embd}, {weights.n_value:,} weights"
    return {
        "weights": str(weights.path),
        "model": f"{metadata.model}: {sizes}, {metadata.tokenizer.describe()}",
        "trained on": f"{metadata.data.removesuffix(str(side))} at {side}×{side}, {metadata.step:,} steps",
        "validation loss": "not known" if loss is None else f"{loss:.4f} nats per token",
    }


def validation_loss(weights: Weights) -> float | None:
    """Nats per token that the run of these weights reports of its validation images; None where it says nothing."""
    run = RunFolder(weights.folder.parent)
    if weights.folder.name != "model" or not run.finished:  # a checkpoint on the way is not what was scored
        return None
    try:
        number = result_of(run.read_result()).numbers.get("val/loss_gen")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s/result.json cannot be read (%s): the page does not state its loss", run.path, error)
        return None
    return None if number is None else number.value


class Ending:
    """Whether Ctrl-C or SIGTERM has asked the demo to end; a second one leaves at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block lasts, the two signals are requests."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(number, before[signal.Signals(number)])

        with signal_handler(numbers, ask):
            yield


def run(components: Components, settings: DemoSettings) -> Result:
    """Serves the page until Ctrl-C or SIGTERM. Its result is empty: nothing is kept of what was done.

    Raises:
        ValueError: Gradio is not there, weights that draw no images, a split without images, a port that is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(INSTALL)
    weights, machine, host = components.trained_weights, components.hardware, settings.host
    if not weights.metadata.network.causal:
        raise ValueError(
            f"task=demo draws images, pixel after pixel; {weights.path} predicts masked pixels "
            f"({weights.metadata.objective['name']}) and draws none: choose weights of objective=ar. What these know: "
            "task=probe"
        )
    from igpt.app import page  # which imports Gradio

    data = components.build_datamodule()
    depth = weights.metadata.network.n_layer
    layer = depth // 2 if settings.layer is None else settings.layer
    if layer > depth:
        raise ValueError(f"task.layer must lie in 0 (the embedding) … {depth}, or be null; got {layer}")
    given = prompt_rows(0.5, settings.rows, data.tokenizer.side)
    with (
        computing_with(settings.threads),
        machine.inference(weights.net()) as net,
        tempfile.TemporaryDirectory(prefix="igpt-demo-") as place,
    ):
        training = TrainingFeatures(
            net=net, machine=machine, data=data, cache=components.cache_dir, weights=weights.sha256,
            made_by=components.cache_key, norm=settings.norm, dtype=settings.dtype, among=settings.among,
            batch_size=settings.batch_size,
        )  # fmt: skip
        bench = Workbench(
            net=net, machine=machine, data=data, training=training, seed=components.seed, split=settings.split,
            at_most=settings.at_most,
            uploads=Uploads(
                components.evaluation_crop, round(settings.upload_mb * MEBIBYTE), settings.upload_pixels
            ),
        )  # fmt: skip
        start = page.Start(
            choices=settings.choices, rows=given, completions=settings.completions, temperature=settings.temperature,
            top_k=settings.top_k, seed=components.seed, nearest=settings.nearest, layer=layer,
        )  # fmt: skip
        ending = Ending()
        try:
            at: dict[str, Any] = {"host": host, "port": settings.port, "place": Path(place)}
            with ending.listening(), page.serving(bench, about(weights), start, **at) as url:
                log.info("the page is at %s; Ctrl-C ends it", url)
                if host not in LOCAL:
                    log.warning("task.host=%s: whoever reaches this machine can open it, there is no password", host)
                while not ending.asked:
                    time.sleep(0.1)
                log.info("ending the demo")
                bench.stop()
        finally:
            bench.stop()
    return Result()
