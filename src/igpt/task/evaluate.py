"""`task=evaluate`: loss of a trained network on a split, histogram baselines, and accuracy with a class head."""

from typing import Literal

import lightning as L
import numpy as np

from igpt.checkpoint.head_files import find_head, has_head
from igpt.checkpoint.igpt_format import Weights
from igpt.data.source import Source
from igpt.metric.likelihood import position_nats, unigram_nats
from igpt.metric.result import Number, Result
from igpt.model.gpt import GPT
from igpt.model.head import ClassHead
from igpt.run.components import Components
from igpt.settings.reading import EvaluateSettings
from igpt.task.class_score import ClassScore, classes_hash
from igpt.task.generative_score import GenerativeScore, choose_units
from igpt.tokens.batches import Batch
from igpt.training.frozen_networks import attach_frozen


class EvaluateModule(L.LightningModule):
    """Scores a frozen network by its generative loss; with a class head also by its predictions."""

    net: GPT

    def __init__(
        self, components: Components, net: GPT, *, split: str, head: ClassHead | None = None, eval_masks: int = 1
    ) -> None:
        super().__init__()
        attach_frozen(self, net)
        self.head, self.split = head, split
        self.n_image = len(components.source.split(split))
        units = choose_units(components, split)
        self.generative_score = GenerativeScore(components.objective, units)
        if head is not None:
            self.class_score = ClassScore(
                components.objective, n_class=len(head.wclf), eval_masks=eval_masks, seed=components.seed, units=units
            )
        self.numbers: dict[str, Number] = {}
        self.predictions = np.empty(0)  # (N,) predicted classes

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.head is None:
            self.generative_score.add(self.net, batch)
        else:
            self.class_score.add(self.net, self.head, batch)

    def on_validation_epoch_end(self) -> None:
        if self.head is None:
            self.numbers = self.generative_score.numbers(self.split, self.trainer, self.n_image)
        else:
            self.numbers, self.predictions = self.class_score.numbers(self.split, self.trainer, self.n_image)


def run(components: Components, settings: EvaluateSettings) -> Result:
    """Nats and bits per token on `split`, and those of two histograms of `baseline_images` training images.

    With accuracy if a class head was trained with these weights.
    """
    weights, hardware, split = components.trained_weights, components.hardware, settings.split
    data = components.build_datamodule(plan=hardware.eval_batch_layout(settings.batch_size), eval_split=split)
    head = load_trained_head(weights, data.source, requested=settings.accuracy)
    net = hardware.build_frozen(weights.build_network, weights.load_into)
    module = EvaluateModule(components, net, split=split, head=head, eval_masks=settings.eval_masks)
    components.runner.validate(module, data)
    numbers = dict(module.numbers)
    if settings.baseline_images:
        train = data.sample_tokens("train", at_most=settings.baseline_images).numpy()
        held_out = data.sample_tokens(split).numpy()
        k, n = data.tokenizer.n_vocab, len(held_out)
        numbers[f"{split}/unigram"] = Number(unigram_nats(train, held_out, k), "nats/token", n)
        numbers[f"{split}/position_histogram"] = Number(position_nats(train, held_out, k), "nats/token", n)
    result = Result(
        numbers=numbers, provenance={"weights": weights.sha256, "tokenizer": data.tokenizer.hash, "split": split}
    )
    if head is not None:
        result.add_confusion(module.class_score.confusion, data.source.class_names)
    return result


def load_trained_head(weights: Weights, source: Source, *, requested: bool | Literal["auto"]) -> ClassHead | None:
    """The trained class head; None if `requested` is False, or `auto` and there is no head or no labels.

    Raises:
        ValueError: accuracy is required but there is no trained head, or the head has other classes.
    """
    if requested is False or (requested == "auto" and (source.n_class is None or not has_head(weights))):
        return None
    head = None
    if has_head(weights):
        head = find_head(weights, n_class=source.n_class, classes=classes_hash(source), class_names=source.class_names)
    if head is None:
        raise ValueError(
            f"{weights.folder} has no trained class head, its accuracy would be that of chance: fine-tune first, "
            "`task=finetune init=RUN_FOLDER`, or read its features, `task=probe`"
        )
    return head
