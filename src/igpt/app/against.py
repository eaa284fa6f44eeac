"""Compares runs with the published numbers of their `task.paper=KEY`, and lists every setting that differs."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

from igpt.metric.likelihood import OF_THESE_PIXELS
from igpt.metric.result import Number
from igpt.report.closing_table import format_readable
from igpt.report.groups import format_typed, group_by_seed
from igpt.report.paper import PRETRAINING, PublishedRow, load_paper
from igpt.report.runs import RunRecord, read_objective, read_run
from igpt.report.summary import average_seeds
from igpt.settings.paths import resolve_nearest

SPLITS = ("test", "val", "cv")  # in order of preference
UNKNOWN = "not known"
OF_ENCODER = "probe_encoder"  # the task of networks that are not Image GPTs
SIZE = ("model.n_layer", "model.n_embd")


@dataclass(frozen=True)
class PaperComparison:
    """A published number beside runs that differ only in their seed; no runs: not measured."""

    published: PublishedRow
    ours: Number | str | None  # str: the numbers of a figure
    differs: list[str]  # differences from the paper
    runs: list[RunRecord]


def compare_with_paper(runs: Sequence[RunRecord], *, every: bool = False) -> list[PaperComparison]:
    """The published numbers with their runs, in the paper's order.

    All rows of a table if a run has one of them; with `every`, all tables.
    """
    beside: dict[PublishedRow, list[PaperComparison]] = {}
    for group in group_by_seed(runs)[0]:
        for row in find_named_rows(group[0]):
            numbers = [number for run in group if isinstance(number := read_measured(row, run), Number)]
            own = average_seeds(numbers) if numbers else read_measured(row, group[0])
            beside.setdefault(row, []).append(PaperComparison(row, own, list_differences(row, group[0]), group))
    tables = {row.table for row in beside}
    shown = [row for row in load_paper().rows if every or row.table in tables]
    return [each for row in shown for each in beside.get(row, [PaperComparison(row, None, [], [])])]


def find_named_rows(run: RunRecord) -> list[PublishedRow]:
    """The published numbers of the run's KEY that it has measured.

    Of several, those with the run's objective, and of these those with its size, if there are any. Of another encoder
    no figures, which are of layers.
    """
    key, facts, expects = paper_key(run), collect_facts(run), load_paper().expects
    rows = [row for row in load_paper().rows if key and row.key == key and read_measured(row, run) is not None]
    rows = [row for row in rows if run.task != OF_ENCODER or row.value is not None]
    for settings in (("objective.name",), SIZE):
        rows = [row for row in rows if all(expects(row).get(s) == facts[s] for s in settings)] or rows
    return rows


def paper_key(run: RunRecord) -> str:
    """KEY of `task.paper=KEY`; of `experiment=paper/KEY` for older runs without that setting; "" if there is none."""
    task = run.config.get("task", {})
    if "paper" in task:
        return str(task["paper"] or "")
    named = [text.removeprefix("experiment=paper/") for text in run.begun.get("overrides") or []
             if text.startswith("experiment=paper/")]  # fmt: skip
    return named[-1] if named else ""


def read_measured(row: PublishedRow, run: RunRecord) -> Number | str | None:
    """The run's value of a published number; of a figure, its numbers and pictures as text; None if it has none."""
    if row.value is None and not row.unpublished:
        patterns = [_name_within(run, pattern) for pattern in row.number.split(", ")]
        shown = {name: f"{name} {format_readable(number)}" for name, number in run.result.numbers.items()}
        shown |= {name: str(file) for name, file in run.result.files.items()}
        return ", ".join(shown[name] for pattern in patterns for name in matching(shown, pattern)) or None
    minuend, _, subtrahend = row.number.partition(" - ")
    first, second = (run.result.numbers.get(_name_within(run, name)) for name in (minuend, subtrahend))
    if first is None or not subtrahend:
        return first
    return None if second is None else Number(first.value - second.value, first.unit, first.n)


def _name_within(run: RunRecord, name: str) -> str:
    """The key of a number in the run's result: `name`, of these pixels alone, or on a later one of SPLITS."""
    split, _, of = name.partition("/")
    splits = SPLITS[SPLITS.index(split) :] if split in SPLITS else ()
    keys = [f"{other}/{of}{end}" for other in splits for end in ("", OF_THESE_PIXELS)]
    return next((key for key in keys if key in run.result.numbers), name)


def list_differences(row: PublishedRow, run: RunRecord) -> list[str]:
    """Every difference between a run and a published row, as `task.steps 3,000 (paper: 1,000,000)`."""
    if run.task == "scaling":
        return _list_compared(run)
    facts, expected, lines = collect_facts(run), load_paper().expects(row), _list_measuring_differences(row, run)
    if run.task == OF_ENCODER:
        expected = {key: value for key, value in expected.items() if key.startswith(("data.", "task."))}
        lines.append(f"another network, {facts['task.encoder']}")
    for key, value in expected.items():
        group = f"{PRETRAINING if key.startswith(PRETRAINING) else ''}data."
        other_data = expected.get(f"{group}name") not in (None, facts.get(f"{group}name"))
        follows = other_data and key.startswith(group) and key not in (f"{group}name", f"{group}resolution")
        if key in facts and facts[key] != value and not follows:
            is_rate = key == f"{PRETRAINING}task.learning_rate"
            from_memory = is_rate and not load_paper().recipes[row.init or ""].confirmed
            paper = "paper, from memory" if from_memory else "paper"
            lines.append(f"{key} {_format_value(facts[key])} ({paper}: {_format_value(value)})")
    of_weights = row.init is not None and run.task != OF_ENCODER
    return lines + (_list_weights_differences(run) if of_weights else [])


def _list_measuring_differences(row: PublishedRow, run: RunRecord) -> list[str]:
    """Differences in the split, the number of images, and the place of the images."""
    name, number, n = _name_within(run, row.number), read_measured(row, run), load_paper().images.get(row.dataset or "")
    split, asked = (key.partition("/")[0] for key in (name, row.number))
    lines = [] if split == asked else [f"measured on {split}, not {asked}"]
    if name.endswith(OF_THESE_PIXELS):
        lines.append("of these pixels, not of the published images: theirs are lossless and not resized")
    if asked in SPLITS and isinstance(number, Number) and number.deviation is None and n not in (None, number.n):
        lines.append(f"on {number.n:,} images (paper: {n:,})")
    place = run.settings.get("data.path")
    return lines + ([f"images from a copy, {Path(place).name}"] if place and Path(str(place)).is_absolute() else [])


def _list_weights_differences(run: RunRecord) -> list[str]:
    """Differences in the initial weights beside their pretraining settings: none, fine-tuned, of unknown origin."""
    history = run.init_history
    if run.task == "finetune" and run.result.provenance.get("from") == "scratch":
        return ["from weights that were never trained"]
    tuned = [before.folder.name for before in history.runs if before.task == "finetune"]
    lines = [f"weights fine-tuned before ({', '.join(tuned)})"] if tuned else []
    if history.pretraining is None and run.task != "pretrain":
        step = history.metadata.get("step")
        known = f"; they say step {step:,}" if step else ""
        lines.append(f"{UNKNOWN}: {history.unknown or 'how its weights were trained'}{known}")
    return lines


def _list_compared(run: RunRecord) -> list[str]:
    """A description of each pretraining run that `task=scaling` compares, and of the paper's."""
    lines = []
    for path in run.config["task"].get("runs") or []:
        try:
            place = resolve_nearest(run.folder, str(path))
            if place is None:
                raise ValueError(f"{path} is not there, or not beside the run")
            sources = read_run(place)
            seen, of = count_images_seen(sources, sources), sources.settings
            lines.append(f"{of['model.name']}, pretrained on {_format_value(seen)} images of {of['data.name']}, "
                        f"{of['data.resolution']}×{of['data.resolution']}")  # fmt: skip
        except (ValueError, KeyError):
            lines.append(f"{UNKNOWN}: what {path} was")
    images = load_paper().recipes["pretrain_l"].images
    return [*lines, f"paper: iGPT-S, M and L, pretrained on {images:,} images of imagenet, 32×32"]


def collect_facts(run: RunRecord) -> dict[str, Any]:
    """The run's values of the settings the paper publishes; of its weights' pretraining with prefix `pretraining.`."""
    settings, metadata = run.settings, run.init_history.metadata
    network = metadata.get("network") or {}
    kind = str(settings.get("tokens._target_") or "palette_tokenizer.").split(".")[-2].removesuffix("_tokenizer")
    facts = {
        **dict.fromkeys(SIZE, UNKNOWN),
        "model.positions": "learned",
        **{f"model.{key}": value for key, value in network.items()},
        **settings,
        "objective.name": read_objective(run) or UNKNOWN,
        "tokens.order": metadata.get("order") or settings.get("tokens.order") or "raster",
        "tokenizer": (metadata.get("tokenizer") or {}).get("kind") or kind,
    }
    if facts.get("task.layer") == facts["model.n_layer"]:
        facts["task.layer"] = "last"
    if n_vocab := network.get("n_vocab") or ("model.n_layer" in settings and settings.get("data.palette_size")):
        facts["n_vocab"] = n_vocab
    if run.task in ("finetune", "probe"):
        facts["retrained with validation images"] = "yes" if run.result.provenance.get("refitted_on_val") else "no"
    first = run if run.task == "pretrain" else run.init_history.pretraining
    if first is not None:
        of_weights = first.settings | {"images": count_images_seen(run, first)}
        facts |= {f"{PRETRAINING}{key}": value for key, value in of_weights.items()}
    return facts


def count_images_seen(run: RunRecord, first: RunRecord) -> int | str:
    """Number of images seen in pretraining, up to the checkpoint in use."""
    before = run.init_history.runs
    sources = [run] if run is first else [each for each in before if each.task == "pretrain"]  # the last one first
    steps: list[Any] = [each.result.provenance.get("step", each.settings.get("task.steps")) for each in sources]
    if run is not first and before[0] is sources[0]:
        steps[0] = run.init_history.metadata.get("step", steps[0])
    try:
        return int(sum(n * each.settings["task.batch_size"] for n, each in zip(steps, sources, strict=True)))
    except (KeyError, TypeError):  # null, or the record of another release
        return UNKNOWN


def _format_value(value: Any) -> str:
    return f"{value:,}" if type(value) is int else format_typed(value)
