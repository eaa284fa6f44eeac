"""The points of a scaling study: pretrained networks, with the numbers that later runs measured of their weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from igpt.metric.result import Number
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.report.runs import RunRecord, flatten
from igpt.scaling_law.parabola import Samples
from igpt.utils import files

PRETRAIN = "pretrain"
EMBEDDINGS = ("wte", "wpe", "sos", "positions.", "wtet")  # weights of tokens and positions, in and out
UNCOMPARED = ("name", "requires", "run_folder", "paper", "batch_size", "dtype", "init")  # settings of a measuring task


@dataclass(frozen=True)
class Target:
    """A number that a study minimises."""

    keys: tuple[str, ...]  # of a run's numbers, the first it has
    tasks: tuple[str, ...]  # that measure it
    label: str
    is_accuracy: bool = False  # one minus the number is minimised


TARGETS = {
    "loss": Target(("val/loss_gen",), (PRETRAIN,), "val loss, nats/token"),
    "probe": Target(("val/accuracy", "cv/accuracy"), ("probe",), "probe error (1 - accuracy of the best layer)", True),
    "kid": Target(("samples/kid",), ("quality",), "KID of samples"),
    "fd_lite0": Target(("samples/fd_lite0",), ("quality",), "Fréchet distance of samples (Lite0)"),
}


@dataclass(frozen=True)
class StudyPoint:
    """One pretrained network of a study."""

    name: str  # of the model
    sizes: dict[str, int]  # n_layer, n_embd, n_head
    network: dict[str, Any]  # `GPTConfig.to_dict`
    n_all: int  # weights
    n_non_embedding: int  # weights without those of tokens and positions
    operations: float  # counted, of the training
    images: int  # seen, repetitions included
    batch_size: int
    train_images: int | None  # different images; None: not recorded
    step_seconds: float | None
    seed: int
    folder: str
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> float:
        """D: tokens seen."""
        return float(self.images * self.network["n_ctx"])

    def count_weights(self, kind: str) -> int:
        """N: `all` weights, or `non_embedding` ones."""
        return self.n_all if kind == "all" else self.n_non_embedding

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "StudyPoint":
        """Inverse of `to_dict`. Raises TypeError or ValueError for anything else."""
        point = StudyPoint(**saved)
        GPTConfig.from_dict(point.network)
        counts = (point.n_all, point.n_non_embedding, point.operations, point.images, point.batch_size)
        if not all(isinstance(n, int | float) and n > 0 for n in counts):
            raise ValueError(f"{point.folder} has counts that are none")
        return point


def count_network_weights(network: GPTConfig) -> tuple[int, int]:
    """(all, non-embedding) weights of a network."""
    with torch.device("meta"):
        named = [(name, weight.numel()) for name, weight in GPT(network).named_parameters()]
    inside = sum(n for name, n in named if not name.startswith(EMBEDDINGS))
    return sum(n for _, n in named), inside


def list_single_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Each run once, a pipeline replaced by its stages."""
    single = [each for run in runs for each in [stage.run for stage in run.stages if stage.run is not None] or [run]]
    return list({run.folder.resolve(): run for run in single}.values())


def read_points(runs: Sequence[RunRecord]) -> list[StudyPoint]:
    """The pretrainings among the runs, joined by the hash of their weights with what other runs measured of them.

    Raises:
        ValueError: no pretraining; two of other tokens, images or objective; two of the same size, budget and seed;
            two measurements of one number that differ, or were made in different ways. Both runs are named.
    """
    single = list_single_runs(runs)
    points: dict[str, StudyPoint] = {}
    for run in [run for run in single if run.task == PRETRAIN]:
        saved = _read_saved(run)
        points.setdefault(str(saved["weights_sha256"]), _build_point(run, saved))
    pretrainings = [run for run in single if run.task == PRETRAIN]
    if not pretrainings:
        raise ValueError("task.runs: no finished pretraining is among them: give those of a study, or their pipelines")
    _check_alike(pretrainings)
    _check_repetitions(list(points.values()))
    for name, target in TARGETS.items():
        _check_alike(list(_join(points, single, name, target)))
    return list(points.values())


def _join(
    points: Mapping[str, StudyPoint], runs: Sequence[RunRecord], name: str, target: Target
) -> Iterator[RunRecord]:
    """Sets a target's values; yields the runs that they come from."""
    sources: dict[str, RunRecord] = {}
    for run in runs:
        sha256 = _read_saved(run)["weights_sha256"] if run.task == PRETRAIN else run.result.provenance.get("weights")
        number = find_target(run.result.numbers, target) if run.task in target.tasks else None
        if number is None or not isinstance(sha256, str) or sha256 not in points:
            continue
        value = 1 - number.value if target.is_accuracy else number.value
        if points[sha256].targets.setdefault(name, value) != value:
            raise ValueError(
                f"task.runs: {sources[sha256].folder} and {run.folder} measured {target.keys[0]} of the same weights, "
                f"and differ: leave one out"
            )
        sources[sha256] = run
        yield run


def find_target(numbers: Mapping[str, Number], target: Target) -> Number | None:
    """The first number of the target's that is there."""
    return next((numbers[key] for key in target.keys if key in numbers), None)


def _read_saved(run: RunRecord) -> dict[str, Any]:
    """`model/config.json` of a pretraining."""
    path = run.folder / "model" / "config.json"
    saved = files.read_json(path) if path.is_file() else None
    if not isinstance(saved, dict) or not {"weights_sha256", "network"} <= saved.keys():
        raise ValueError(f"task.runs: {path} is missing or damaged: it says which weights {run.folder} trained")
    return saved


def _build_point(run: RunRecord, saved: Mapping[str, Any]) -> StudyPoint:
    network = GPTConfig.from_dict(saved["network"])
    n_all, n_non_embedding = count_network_weights(network)
    numbers, known = run.result.numbers, run.result.provenance.get("train_images")
    if lacking := [key for key in ("train/operations", "train/images_seen") if key not in numbers]:
        raise ValueError(f"task.runs: {run.folder} has no {lacking[0]}: it is of an older release, train it again")
    seconds = numbers.get("train/step_seconds")
    return StudyPoint(
        name=str(run.config["model"]["name"]),
        sizes={key: getattr(network, key) for key in ("n_layer", "n_embd", "n_head")},
        network=network.to_dict(),
        n_all=n_all,
        n_non_embedding=n_non_embedding,
        operations=numbers["train/operations"].value,
        images=int(numbers["train/images_seen"].value),
        batch_size=int(run.config["task"]["batch_size"]),
        train_images=known if isinstance(known, int) else None,
        step_seconds=None if seconds is None else seconds.value,
        seed=int(run.config["seed"]),
        folder=str(run.folder),
    )


def _check_alike(runs: Sequence[RunRecord]) -> None:
    """Raises ValueError where runs differ in what makes their numbers comparable."""
    for run in runs[1:]:
        first, other = (_describe_conditions(each) for each in (runs[0], run))
        for key in first | other:
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"task.runs: {runs[0].folder} and {run.folder} differ in {key}, {first.get(key)} and "
                    f"{other.get(key)}: the runs of a study share tokens, images, objective and the way of measuring"
                )


def _describe_conditions(run: RunRecord) -> dict[str, Any]:
    """The flat settings that all runs of one task have in common in a study."""
    config, hashes = run.config, run.begun.get("files_sha256") or {}
    settings = {"data": {key: value for key, value in config["data"].items() if key != "path"}}
    if run.task != PRETRAIN:
        settings["task"] = {key: value for key, value in config["task"].items() if key not in UNCOMPARED}
    else:
        settings["objective"] = config["objective"]
    tokens = {"tokens": run.result.provenance.get("tokenizer"), "data.path": hashes.get("data.path")}
    return flatten(settings) | tokens


def _check_repetitions(points: Sequence[StudyPoint]) -> None:
    """Raises ValueError for two networks of the same size, images seen and seed."""
    seen: dict[str, StudyPoint] = {}
    for point in points:
        key = repr((point.network, point.images, point.seed))
        if (other := seen.setdefault(key, point)) is not point:
            raise ValueError(
                f"task.runs: {other.folder} and {point.folder} are of the same size, budget and seed: leave one out"
            )


def list_targets(points: Sequence[StudyPoint]) -> list[str]:
    """The targets that some point has."""
    return [name for name in TARGETS if any(name in point.targets for point in points)]


def build_samples(points: Sequence[StudyPoint], target: str, *, weights: str) -> Samples:
    """The points that have the target. `weights`: all or non_embedding.

    Raises:
        ValueError: no point has it.
    """
    known = [point for point in points if target in point.targets]
    if not known:
        raise ValueError(f"task.targets: no run has {TARGETS[target].keys[0]} of the weights of task.runs")
    columns = [(point.count_weights(weights), point.tokens, point.operations, point.targets[target]) for point in known]
    return Samples(*np.array(columns, dtype=np.float64).T)
