"""`task=demo`: serves a page for completions and nearest images of a trained network. Gradio is in `demo_page`."""

import importlib.util
import logging
import time

import torch

from igpt.app.nearest import TrainingFeatures
from igpt.app.workbench import MEBIBYTE, Workbench
from igpt.checkpoint.classifier import Classifier, has_class_head
from igpt.checkpoint.igpt_format import Weights
from igpt.distributed.process_state import num_threads
from igpt.distributed.signals import StopRequest
from igpt.metric.result import Result
from igpt.probe.depth import resolve_layer
from igpt.report.runs import read_run
from igpt.run.components import Components
from igpt.settings.generation import DemoSettings
from igpt.task.complete import prompt_rows

log = logging.getLogger(__name__)

INSTALL = "task=demo needs Gradio, which is not installed here: pip install gradio==6.31.0 (or igpt[demo])"


def describe_weights(weights: Weights, classifier: Classifier | None = None) -> dict[str, str]:
    """The description of the weights on the page."""
    metadata, loss = weights.metadata, read_validation_loss(weights)
    side = metadata.tokenizer.side
    data = metadata.data.removesuffix(str(side)).removesuffix("-")
    sizes = f"{metadata.network.n_layer} blocks of {metadata.network.n_embd}, {weights.n_parameter:,} weights"
    classes = {} if classifier is None else {"classes": f"{classifier.n_class:,}, by the {classifier.description}"}
    return {
        "weights": str(weights.path),
        "model": f"{metadata.model}: {sizes}, {metadata.tokenizer.describe()}",
        "trained on": f"{data} at {side}×{side}, {metadata.step:,} steps",
        "validation loss": "not known" if loss is None else f"{loss:.4f} nats per token",
        **classes,
    }


def read_validation_loss(weights: Weights) -> float | None:
    """val/loss_gen, in nats per token, of the run that made the weights; None if not known."""
    folder = weights.folder.parent
    scored = weights.folder.name == "model" and (folder / "result.json").is_file()  # not an intermediate checkpoint
    try:
        number = read_run(folder).result.numbers.get("val/loss_gen") if scored else None
    except ValueError as error:
        log.warning("%s: the page does not state its loss", error)
        return None
    return None if number is None else number.value


def run(components: Components, settings: DemoSettings) -> Result:
    """Serves the page until Ctrl-C or SIGTERM; returns an empty result.

    Raises:
        ValueError: Gradio is missing, weights that cannot draw images, a split without images, a port in use.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(INSTALL)
    weights, machine = components.trained_weights, components.hardware
    if not weights.metadata.network.causal:
        raise ValueError(
            f"task=demo draws images, pixel after pixel; {weights.path} predicts masked pixels "
            f"({weights.metadata.objective['name']}) and draws none: choose weights of objective=ar. What these know: "
            "task=probe"
        )
    from igpt.app.demo_guard import LOCAL, UploadFolder, private_folder  # which import Starlette and Gradio
    from igpt.app.demo_page import serve

    data, depth = components.build_datamodule(), weights.metadata.network.n_layer
    layer = resolve_layer(0.5 if settings.layer is None else settings.layer, depth)
    rows = prompt_rows(0.5, settings.rows, data.tokenizer.side)
    settings = settings.model_copy(update={"layer": layer, "rows": rows})
    # The threads of a matrix product wait for each other in a busy loop, so one that shares its core with the browser
    # delays all: on two cores, two threads draw several times slower than one (docs/demo.md).
    with (
        num_threads(settings.threads or max(1, torch.get_num_threads() - 1)),
        machine.inference(weights.build_network, weights.load_into) as net,
        private_folder() as folder,
    ):
        training = TrainingFeatures(
            net, machine, data, components.cache_dir, settings, weights=weights.sha256, cache_key=components.cache_key
        )
        classifier = components.classifier if has_class_head(weights, settings.head) else None
        if classifier is not None and isinstance(classifier.head, torch.nn.Module):
            classifier.head.to(machine.device)
        bench = Workbench(training, components.evaluation_crop, settings, classifier)
        uploads = UploadFolder(
            folder / "uploads",
            file_bytes=round(settings.upload_mb * MEBIBYTE),
            total_bytes=round(settings.uploads_mb * MEBIBYTE),
            n_files=settings.uploads,
            seconds=settings.upload_seconds,
        )
        request = StopRequest("ending the demo")
        try:
            with request.install_handlers(), serve(bench, describe_weights(weights, classifier), uploads) as url:
                log.info("the page is at %s (Ctrl-C ends it)", url)
                if settings.host not in LOCAL:
                    warning = "task.host=%s: whoever reaches this machine can open it, there is no password"
                    log.warning(warning, settings.host)
                while not request.number:
                    time.sleep(0.1)
                    uploads.remove_old()
                bench.stop()
        finally:
            bench.stop()
    return Result()
