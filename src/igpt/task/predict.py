"""`task=predict`: the classes of images, by a trained head: a table in CSV, pictures, and accuracy where labels are."""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix
from tqdm.auto import tqdm

from igpt.checkpoint.classifier import Classifier
from igpt.checkpoint.head_files import shorten_class_names
from igpt.data.classes import describe_classes, format_class_name
from igpt.data.listed_images import ALL, UNREADABLE, ListedImages, list_images
from igpt.data.source import Source, plain_pixels
from igpt.distributed import ranks
from igpt.metric.result import Grid, Number, Result
from igpt.metric.share import share_number
from igpt.model.gpt import GPT
from igpt.probe.classify import classify, rank_classes
from igpt.run.components import Components
from igpt.settings.older_configs import read_record
from igpt.settings.reading import PredictSettings
from igpt.task.prediction_table import MOST_RANKED, Predictions, open_table
from igpt.tokens.batches import Batch
from igpt.tokens.datamodule import TokenDataModule
from igpt.training.frozen_networks import attach_frozen

log = logging.getLogger(__name__)

TABLE = "predictions.csv"
MOST_CLASSES = 12  # rows of the summary by class
SHORT = 16  # characters that fit under an image
OF_ALL = "test"  # stream of the masks of `all`: those of the same images in a test split


class PredictModule(L.LightningModule):
    """Predicts classes and hands them, batch by batch, to `take`."""

    net: GPT

    def __init__(
        self,
        components: Components,
        net: GPT,
        classifier: Classifier,
        *,
        masks: int,
        take: Callable[[Predictions], None],
    ) -> None:
        super().__init__()
        attach_frozen(self, net)
        self.head, self.objective = classifier.head, components.objective
        self.masks, self.seed, self.take = masks, classifier.seed, take
        self.n_ranked = min(MOST_RANKED, classifier.n_class)

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        classes, probabilities = classify(
            self.net, self.head, self.objective, batch.tokens, rng_keys=batch.rng_keys, rows=batch.rows,
            masks=self.masks, seed=self.seed,
        )  # fmt: skip
        ranked = rank_classes(classes, probabilities, self.n_ranked)
        parts = batch.rows, ranked, probabilities.gather(1, ranked), batch.labels != UNREADABLE
        if len(batch.rows):  # else the last batch of this rank: a sharded network needed it for the others' passes
            self.take(Predictions(*(part.cpu().numpy() for part in parts)))


class ListedDataModule(TokenDataModule):
    """One pass over listed images. Masks are keyed by `eval_split` and an image's position."""

    images: ListedImages

    def predict_dataloader(self) -> torch.utils.data.DataLoader[object]:
        return self.eval_loader(self.images, self.eval_split)


def run(components: Components, settings: PredictSettings) -> Result:
    """Classes of all images of a split, or of a folder: table, contact sheet, counts by class.

    Where labels are known to the head, by name: accuracy, top 5, confusions, and the most confident mistakes.

    Raises:
        ValueError: no images, none that can be read, or no head of these weights.
    """
    classifier, source, hardware = components.classifier, components.source, components.hardware
    split = choose_split(components, settings.split)
    images = list_images(source, split)
    labels = match_labels(source, images.labels, classifier)
    log.info("%s: %s images, by the %s", split, f"{len(images):,}", classifier.description)
    masks = classifier.eval_masks if settings.eval_masks is None else settings.eval_masks
    masks = 1 if components.objective.causal else masks
    data = ListedDataModule(
        source=source, tokenizer=components.tokenizer, seed=classifier.seed, num_workers=hardware.n_reader,
        cache=components.cache_dir, plan=hardware.eval_batch_layout(settings.batch_size),
        eval_split=OF_ALL if split == ALL else split,
    )  # fmt: skip
    data.images = images
    weights = components.trained_weights
    net = hardware.build_frozen(weights.build_network, weights.load_into)
    rank, parts = ranks.this_rank(), list[Predictions]()
    path, hidden = components.run_dir / TABLE, None if rank.is_first else True
    with (
        tqdm(total=len(images), desc="predicting", unit="image", disable=hidden, leave=False) as bar,
        open_table(path, images, labels, classifier) if rank.is_first else nullcontext(parts.append) as write,
    ):

        def take(part: Predictions) -> None:
            parts.append(part)
            if rank.count == 1:  # else they come in no order: written at the end
                write(part)
            bar.update(len(part.rows) * rank.count)

        components.runner.predict(PredictModule(components, net, classifier, masks=masks, take=take), data)
        gathered = [part for of_rank in ranks.all_gather_object(parts) for part in of_rank]
        predictions = Predictions.join(gathered)
        if rank.is_first and rank.count > 1:
            write(predictions)
        if not predictions.is_readable.any():
            raise ValueError(
                f"none of the {len(images):,} images can be read, as {images.name(0)}: {images.find_problem(0)}"
            )
    result = Result(files={"table": Path(TABLE), "predicted_classes": Path("classes.txt")})
    score(result, predictions, labels, classifier, split)
    show(result, predictions, images, labels, classifier, settings)
    if rank.is_first:
        (components.run_dir / "classes.txt").write_text(
            summarize(predictions, labels, classifier), encoding="utf-8", errors="backslashreplace"
        )
    if n_bad := int((~predictions.is_readable).sum()):
        first = int(np.argmin(predictions.is_readable))
        remark = f"{n_bad:,} of {len(images):,} images cannot be read, as {images.name(first)}"
        result.provenance["warning"] = f"{' '.join(remark.split())}: the column error of {TABLE} says why"
    result.provenance |= {
        "weights": weights.sha256, "tokenizer": components.tokenizer.hash,
        "head": classifier.description, "head_sha256": classifier.sha256, "split": split, "masks": masks,
        "masks_seed": classifier.seed,
    }  # fmt: skip
    return result


def choose_split(components: Components, split: str) -> str:
    """`split`, unless that is `auto`: then `test` if there is one, else `val` of the head's own images, else `all`."""
    source = components.source
    if split != "auto":
        return split
    if len(source.split("test")):
        return "test"
    return "val" if is_trained_on(components) and len(source.split("val")) else ALL


def is_trained_on(components: Components) -> bool:
    """Whether the run that made the head read the images of this run; False if that is not recorded."""
    run, path = components.run, components.classifier.path
    folder = next((folder for folder in list(path.parents)[:2] if (folder / "run.json").is_file()), None)
    try:
        record = read_record(folder / "run.json") if folder is not None else {"config": {}}
        name, hashes = record["config"].get("data", {}).get("name"), record.get("files_sha256", {})
    except (ValueError, LookupError, AttributeError):  # damaged, or of a later release
        return False
    return bool(name == run.config["data"]["name"] and hashes.get("data.path") == run.input_hashes.get("data.path"))


def match_labels(source: Source, labels: np.ndarray, classifier: Classifier) -> np.ndarray:
    """Labels of the source as the head numbers them, by class name: (N,) → (N,) int64; -1: none, or of no such class.

    Where names are not known, the number of a class counts if head and images are of one dataset, or if the head
    records no names and there are as many classes.
    """
    none = np.full(len(labels), -1)
    has_label = labels >= 0
    if not has_label.any():
        return none
    own, known = shorten_class_names(source.class_names), classifier.class_names
    if own is not None and known is not None:
        number = {name: label for label, name in enumerate(known)}
        mapped = np.array([number.get(name, -1) for name in own])
        matched: np.ndarray = np.where(has_label, mapped[labels], -1)
        if unknown := Counter(own[label] for label in labels[has_label & (matched < 0)].tolist()):
            names = ", ".join(format_class_name(name) for name, _ in unknown.most_common(3))
            log.warning(
                "%d of the images count as without label, as the head does not know their classes (%s%s); it knows %s",
                unknown.total(), names, ", …" * (len(unknown) > 3), describe_classes(known),
            )  # fmt: skip
        return matched
    is_same = source.name == classifier.data
    if source.n_class == classifier.n_class and (is_same or known is None):
        if not is_same:
            log.warning("the head does not name its %d classes: the accuracy is right only if they are those of %s",
                        classifier.n_class, source.name)  # fmt: skip
        return np.where(has_label, labels, -1)
    log.warning(
        "the classes of %s cannot be told to be those of the head, of %s: no accuracy", source.name, classifier.data
    )
    return none


def score(result: Result, predictions: Predictions, labels: np.ndarray, classifier: Classifier, split: str) -> None:
    """Adds accuracy, top 5 and confusions of the labelled images; the number of images, and of those with label."""
    judged = predictions.is_readable & (labels >= 0)
    ranked, true = predictions.ranked[judged], labels[judged]
    if len(true):
        right = float(np.mean(ranked[:, 0] == true))
        result.numbers[f"{split}/accuracy"] = share_number(right, len(true), features=classifier.description)
        if classifier.n_class > MOST_RANKED:
            share = float(np.mean((ranked == true[:, None]).any(axis=1)))
            result.numbers[f"{split}/top_5"] = share_number(share, len(true), features=classifier.description)
        counts = multiclass_confusion_matrix(
            torch.from_numpy(ranked[:, 0]), torch.from_numpy(true), classifier.n_class
        ).numpy()
        result.add_confusion(counts, classifier.class_names)
    n_read = int(predictions.is_readable.sum())
    result.numbers["predict/images"] = Number(n_read, "images", n_read)
    if n_read < len(labels):
        result.numbers["predict/unreadable"] = Number(len(labels) - n_read, "images", len(labels))


def show(
    result: Result, predictions: Predictions, images: ListedImages, labels: np.ndarray, classifier: Classifier,
    settings: PredictSettings,
) -> None:  # fmt: skip
    """Adds the contact sheet, images evenly spaced over the listing, and the most confident mistakes."""
    readable = np.flatnonzero(predictions.is_readable)
    chosen = readable[np.linspace(0, len(readable) - 1, min(settings.count, len(readable)), dtype=int)]
    classes, probabilities = predictions.ranked[:, 0], predictions.probabilities[:, 0]

    def caption(row: int, second: str) -> str:
        name = format_class_name(classifier.name_class(int(classes[row])))
        return f"{name}, {100 * probabilities[row]:.0f} %\n{format_class_name(second)}"

    def draw(rows: np.ndarray, captions: list[str]) -> Grid:
        grid = Grid.square(plain_pixels(images, rows.tolist()))
        return Grid(grid.images, captions=tuple(captions))

    names = [name if len(name) <= SHORT else name.rpartition("/")[2] for name in map(images.name, chosen.tolist())]
    result.grids["predictions"] = draw(chosen, list(map(caption, chosen.tolist(), names)))
    wrong = np.flatnonzero(predictions.is_readable & (labels >= 0) & (classes != labels))
    worst = wrong[np.argsort(-probabilities[wrong], kind="stable")[: settings.mistakes]]
    if len(worst):
        true = [f"true: {classifier.name_class(int(label))}" for label in labels[worst]]
        result.grids["mistakes"] = draw(worst, list(map(caption, worst.tolist(), true)))


def summarize(predictions: Predictions, labels: np.ndarray, classifier: Classifier) -> str:
    """A table of the most frequent predicted classes: images; with labels, how many are of it, and are found to be."""
    classes, readable = predictions.ranked[:, 0], predictions.is_readable
    counts = np.bincount(classes[readable], minlength=classifier.n_class)
    judged = readable & (labels >= 0)
    of_class = np.bincount(labels[judged], minlength=classifier.n_class)
    right = np.bincount(labels[judged & (classes == labels)], minlength=classifier.n_class)
    order = [label for label in np.argsort(-counts, kind="stable").tolist() if counts[label]]
    names = {label: format_class_name(classifier.name_class(label)) for label in order[:MOST_CLASSES]}
    width = max(len("class"), *map(len, names.values()))
    heads = ["predicted", *(["of this class", "of them right"] if judged.any() else [])]
    lines = ["  ".join([f"{'class':<{width}}", *heads])]
    for label, name in names.items():
        values = [counts[label], of_class[label], right[label]][: len(heads)]
        cells = [f"{value:>{len(head)},}" for value, head in zip(values, heads, strict=True)]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    if more := len(order) - len(names):
        rest = int(counts.sum() - counts[order[:MOST_CLASSES]].sum())
        lines.append(f"and {more:,} more classes, of {rest:,} images")
    return "\n".join(lines)
