"""Weights with a trained head that tells classes apart: a fine-tuned network's own, or a probe's."""

import logging
from dataclasses import dataclass
from pathlib import Path

from igpt.checkpoint.head_files import HEAD, build_head, has_head, read_head
from igpt.checkpoint.igpt_format import Weights
from igpt.checkpoint.probe_files import PROBE, find_probe, read_probe
from igpt.model.head import ClassHead, ProbeHead
from igpt.utils import files

log = logging.getLogger(__name__)

DEFAULT_MASKS = 5  # of fine-tuned heads that do not record theirs: the paper's and the default of task.eval_masks


@dataclass(frozen=True)
class Classifier:
    """A trained head with its classes. `head.scores(net, tokens, visible)` → (B, K) float32."""

    head: ClassHead | ProbeHead
    n_class: int  # K
    class_names: tuple[str, ...] | None  # by label; None: unknown
    data: str  # name of the dataset that it was trained on
    eval_masks: int  # masks per image, combined by vote; read only by masked objectives
    seed: int  # of the masks and of the vote
    sha256: str  # of the head
    path: Path  # of its file
    description: str  # `fine-tuned head`, `probe of layer 3`

    def name_class(self, label: int) -> str:
        """The name of a class, `class 3` without one."""
        return f"class {label}" if self.class_names is None else self.class_names[label]


def has_class_head(weights: Weights, probe: str | None = None) -> bool:
    """Whether `find_class_head` looks for a head instead of raising that there is none."""
    return probe is not None or weights.probe is not None or has_head(weights)


def find_class_head(weights: Weights, probe: str | None = None) -> Classifier:
    """The head of some weights: the probe at the path `probe`, else the one they were found by, else their own.

    Raises:
        ValueError: no head, a damaged one, or one of other weights, layers or images.
    """
    place = weights.probe if probe is None else Path(probe).expanduser()
    if place is not None:
        return _read_probe(weights, place)
    if not has_class_head(weights):
        raise ValueError(
            f"{weights.path} has no class head: init=RUN of task=finetune or task=probe, or task.head=PROBE_RUN beside "
            "the weights that it probed"
        )
    about, weight = read_head(weights)
    path, sha256 = weights.path, weights.sha256
    if weights.wclf is None:
        path = weights.folder / HEAD
        sha256 = files.sha256(path)
    seed = weights.metadata.seed if about.seed is None else about.seed
    return Classifier(
        build_head(weight), about.n_class, about.class_names, about.data, about.eval_masks or DEFAULT_MASKS, seed,
        sha256, path, "fine-tuned head",
    )  # fmt: skip


def _read_probe(weights: Weights, place: Path) -> Classifier:
    path = find_probe(place)
    if path is None:
        raise ValueError(f"{place} holds no {PROBE}: expected a finished run of task=probe, or that file")
    head, about = read_probe(path)
    n_layer, width = weights.metadata.network.n_layer, weights.metadata.network.n_embd
    if about.weights != weights.sha256:
        raise ValueError(f"{path} is a probe of other weights than {weights.path}: give those that it probed")
    if not head.layers or not all(0 <= layer <= n_layer for layer in head.layers):
        raise ValueError(f"{path} reads layers {list(head.layers)}, the network has 0 … {n_layer}: run task=probe anew")
    if head.weight.shape[1] != width * len(head.layers):
        raise ValueError(
            f"{path} reads {head.weight.shape[1]} features of {len(head.layers)} layer(s), the network has {width} in "
            "each: run task=probe anew"
        )
    if about.resolution != weights.tokenizer.side:
        raise ValueError(
            f"{path} was fitted on images of {about.resolution}×{about.resolution} pixels, {weights.path} reads "
            f"{weights.tokenizer.side}×{weights.tokenizer.side}: init={path.parent} takes both together"
        )
    layers = f"layer{'s' if len(head.layers) > 1 else ''} {', '.join(map(str, head.layers))}"
    return Classifier(
        head, len(head.weight), about.class_names, about.data, about.eval_masks, about.seed, files.sha256(path), path,
        f"probe of {layers}",
    )  # fmt: skip
