"""The table of `task=predict`: one line of CSV for each image, in the order of the listing."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt.checkpoint.classifier import Classifier
from igpt.data.listed_images import ListedImages
from igpt.utils import files

MOST_RANKED = 5  # classes of an image that are listed
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes what begins so


@dataclass(frozen=True)
class Predictions:
    """The likeliest classes of images, the predicted one first."""

    rows: np.ndarray  # (N,) position in the listing
    ranked: np.ndarray  # (N, k) int64
    probabilities: np.ndarray  # (N, k) float32, of those
    is_readable: np.ndarray  # (N,) bool: otherwise the others say nothing

    @staticmethod
    def join(parts: Sequence["Predictions"]) -> "Predictions":
        """All of them, by row. Every row must be there once."""
        rows = np.concatenate([part.rows for part in parts])
        order = np.argsort(rows)
        assert np.array_equal(rows[order], np.arange(len(rows))), "an image was predicted twice, or not at all"
        names = ("rows", "ranked", "probabilities", "is_readable")
        return Predictions(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in names))


@contextmanager
def open_table(
    path: Path, images: ListedImages, labels: np.ndarray, classifier: Classifier
) -> Iterator[Callable[[Predictions], None]]:
    """Yields a function that writes predictions, in order, to a CSV file, which is in its place after the block.

    `labels` (N,): classes of the head, -1: none. Columns: file, class, probability, class_2, probability_2, …; with
    labels true_class and is_right; error.
    """
    k, has_labels = min(MOST_RANKED, classifier.n_class), bool((labels >= 0).any())
    of_rank = [f"{name}_{rank}" for rank in range(2, k + 1) for name in ("class", "probability")]
    of_label = ["true_class", "is_right"] if has_labels else []
    with (
        files.atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.writer(file)
        table.writerow(["file", "class", "probability", *of_rank, *of_label, "error"])

        def write(predictions: Predictions) -> None:
            for row, ranked, probabilities, is_readable in zip(
                predictions.rows.tolist(), predictions.ranked.tolist(), predictions.probabilities.tolist(),
                predictions.is_readable.tolist(), strict=True,
            ):  # fmt: skip
                found, problem = [""] * (2 * k), ""
                if is_readable:
                    found = [
                        cell
                        for label, probability in zip(ranked, probabilities, strict=True)
                        for cell in (disarm(classifier.name_class(label)), f"{probability:.6f}")
                    ]
                else:
                    problem = images.find_problem(row)
                true = int(labels[row])
                judged = ["", ""] if true < 0 else [disarm(classifier.name_class(true)), ""]
                if true >= 0 and is_readable:
                    judged[1] = str(true == ranked[0]).lower()
                table.writerow([_name_file(images.name(row)), *found, *(judged if has_labels else []), disarm(problem)])

        yield write


def disarm(text: str) -> str:
    """A text that no spreadsheet takes for a formula: with an apostrophe before `=`, `+`, `-`, `@`, tab and return."""
    return f"'{text}" if text.startswith(FORMULA) else text


def _name_file(name: str) -> str:
    """As `disarm`, still the path of the same file: `./=1.jpg`."""
    return f"./{name}" if name.startswith(FORMULA) else name
