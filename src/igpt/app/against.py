"""Runs beside the published numbers that are nearest to what they measure, with every setting that differs said."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from igpt.app.groups import grouped
from igpt.app.summary import over_seeds
from igpt.metric.result import Number
from igpt.report.paper import PUBLISHED, Published
from igpt.report.protocols import N_COLOUR, PRECISION, RECIPES, SIZES, TEST_IMAGES
from igpt.report.runs import Run, nearest_path, objective_of, read_run
from igpt.report.text import readable

LENGTH = ("steps", "batch_size")  # of pretraining
SUBSTITUTES = {"test/": ("val/", "cv/"), "val/": ("cv/",)}  # what is taken where a run has not read a split


@dataclass(frozen=True)
class Row:
    """A published number, and runs that differ in their seed alone beside it; no runs: not run."""

    published: Published
    ours: Number | str | None  # text: what a figure shows
    differs: list[str]  # settings that are not the paper's; of the value too: `val, not test`
    runs: list[Run]


def rows(runs: Sequence[Run], *, every: bool = False) -> list[Row]:
    """Each run beside the nearest published numbers, in the paper's order; with `every`, also those of no run.

    Where some runs touch a table, its other rows are shown, too, so that it can be read as a whole.
    """
    groups, _ = grouped(runs)
    touched: dict[int, list[Row]] = {}
    for group in groups:
        for index, row in _of_group(group):
            touched.setdefault(index, []).append(row)
    tables = {PUBLISHED[index].table for index in touched}
    shown = []
    for index, of in enumerate(PUBLISHED):
        if every or of.table in tables:
            shown += touched.get(index, [Row(of, None, [], [])])
    return shown


def _of_group(group: list[Run]) -> Iterable[tuple[int, Row]]:
    first = group[0]
    for index in nearest(first):
        of = PUBLISHED[index]
        if of.value is None:
            yield index, Row(of, figure_of(first, of.key), differences(of, first), group)
            continue
        found = [value_of(run, of.key) for run in group]
        number = over_seeds([number for number, _ in found if number is not None])
        said = [f"measured on {found[0][1]}, not {of.key.partition('/')[0]}"] if found[0][1] else []
        yield index, Row(of, number, [*said, *differences(of, first), *_images(of, number, first)], group)


def nearest(run: Run) -> list[int]:
    """The published numbers that a run stands beside, as indices: of each number it has the one of nearest setting.

    Task, dataset and objective must be the same, and whether it started from trained weights; what else differs
    (resolution, size, protocol) does not keep a run from its row, and is said there.
    """
    best: dict[tuple[str, str], tuple[tuple[float, ...], int]] = {}
    sizes, objective = network_of(run), objective_of(run) or "ar"  # where it is not known, that is said
    for index, of in enumerate(PUBLISHED):
        same = run.task in of.tasks and of.dataset in (None, run.config["data"].get("name"))
        if not same or of.objective not in (None, objective) or of.scratch != _from_scratch(run):
            continue
        if not (figure_of(run, of.key) if of.value is None else value_of(run, of.key)[0]):
            continue
        size = SIZES[of.method]
        if of.table == "parameters" and (sizes.get("n_layer"), sizes.get("n_embd")) != (size.n_layer, size.n_embd):
            continue
        weights = sizes.get("n_layer", 1) * sizes.get("n_embd", 1) ** 2
        side = run.config["data"].get("resolution") or 1
        distance = (
            len(_protocol(of, run)),
            abs(math.log(side / (of.resolution or side))),
            abs(math.log(weights / (size.n_layer * size.n_embd**2))),
        )
        slot = of.table, of.key
        if slot not in best or distance < best[slot][0]:
            best[slot] = distance, index
    return sorted(index for _, index in best.values())


def value_of(run: Run, key: str) -> tuple[Number | None, str]:
    """A number of a run, or the difference of two; and the split it is of where that is not the one asked for."""
    if " - " in key:
        ours, theirs = (run.numbers.get(part) for part in key.split(" - "))
        if ours is None or theirs is None:
            return None, ""
        return Number(ours.value - theirs.value, ours.unit, ours.n), ""
    split = key[: key.find("/") + 1]
    for other in ("", *SUBSTITUTES.get(split, ())):
        name = f"{other}{key.removeprefix(split)}" if other else key
        if name in run.numbers:
            return run.numbers[name], other.rstrip("/")
    return None, ""


def figure_of(run: Run, keys: str) -> str:
    """What a run has of a figure that prints no number: each of the numbers that belong to it."""
    parts = []
    for key in keys.split(", "):
        if "*" in key:
            parts += [(name, number) for name, number in run.numbers.items() if fnmatch(name, key)]
        elif (number := value_of(run, key)[0]) is not None:
            parts.append((key, number))
    return ", ".join(_part(name, number) for name, number in parts)


def _part(name: str, number: Number) -> str:
    if name == "probe/layer":
        return f"best layer {int(number.value)} {number.unit}"
    if number.unit.startswith("Spearman"):
        return f"{name.partition('/')[0]}: {number.value:.2f} ({number.unit}, of {number.n})"
    return f"{name.removeprefix('val/').replace('_', ' ')} {readable(number)}"


def network_of(run: Run) -> dict[str, Any]:
    """n_layer, n_embd, n_head, n_vocab of the network that a run trained or read, as far as it is known."""
    chosen = {key: value for key, value in run.config["model"].items() if key in ("n_layer", "n_embd", "n_head")}
    known: dict[str, Any] = run.start.origin.get("network") or {}
    colours = run.config["data"].get("n_colour")
    return ({"n_vocab": colours} if chosen and colours else {}) | known | chosen


def _from_scratch(run: Run) -> bool:
    return run.task == "finetune" and run.result.provenance.get("from") == "scratch"


def differences(of: Published, run: Run) -> list[str]:
    """Every setting in which a run is not what was published, as `task.steps 3,000 (paper: 1,000,000)`."""
    if of.table == "parameters":
        side = run.config["data"].get("resolution") or 32
        said = [f"{side**2:,} positions (paper: 1,024)"] if side != 32 else []
        return [*said, *(line for line in _network(of, run))]
    if run.task == "scaling":
        return _of_several(run)
    return [*_network(of, run), *_protocol(of, run), *_pretraining(of, run)]


def _of_several(run: Run) -> list[str]:
    """What the runs were that a comparison over checkpoints is of."""
    said = []
    for path in run.config["task"].get("runs") or []:
        place = nearest_path(run.folder, str(path))
        try:
            made = read_run(place) if place is not None else None
        except ValueError:
            made = None
        if made is None or not all(type(made.config["task"].get(key)) is int for key in LENGTH):
            said.append(f"not known: what {path} was")
            continue
        name, data = made.config["model"].get("name"), made.config["data"]
        where = f"{data.get('name')}, {data.get('resolution')}×{data.get('resolution')}"
        said.append(f"{name}, pretrained on {images_seen(made, made):,} images of {where}")
    paper = next(iter(RECIPES.values())).images
    return [*said, f"paper: iGPT-S, M and L, pretrained on {paper:,} images of imagenet, 32×32"]


def _network(of: Published, run: Run) -> list[str]:
    said = []
    side, sizes, theirs = run.config["data"].get("resolution"), network_of(run), SIZES[of.method]
    if of.resolution not in (None, side):
        said.append(f"{side}×{side} pixels (paper: {of.resolution}×{of.resolution})")
    if not objective_of(run):
        said.append(f"objective not known (paper: {(of.objective or '').upper()})")
    name = run.start.origin.get("model") or run.config["model"].get("name")
    if not sizes.get("n_layer"):
        said.append(f"size of the network not known (paper: {of.method})")
    elif (sizes["n_layer"], sizes["n_embd"]) != (theirs.n_layer, theirs.n_embd):
        said.append(
            f"{name}, {sizes['n_layer']} blocks of width {sizes['n_embd']:,} (paper: {of.method}, {theirs.n_layer} of "
            f"{theirs.n_embd:,})"
        )
    elif theirs.n_head not in (None, sizes.get("n_head")):
        said.append(f"{sizes.get('n_head')} heads (paper: {theirs.n_head})")
    if sizes.get("n_vocab", N_COLOUR) != N_COLOUR:
        said.append(f"{sizes['n_vocab']} tokens (paper: {N_COLOUR} colours)")
    if run.start.origin.get("order") == "other" or run.settings.get("tokens.order") not in (None, "raster"):
        said.append("pixels in another order")
    target = str(run.settings.get("tokens._target_") or "palette_tokenizer.")
    kind = (run.start.origin.get("tokenizer") or {}).get("kind") or target.split(".")[-2].replace("_tokenizer", "")
    if kind != "palette":
        said.append(f"tokens are {kind} (paper: colours)")
    positions = sizes.get("positions") or run.settings.get("model.positions") or "learned"
    if positions != "learned":
        said.append(f"positions {positions} (paper: learned)")
    return said


def _protocol(of: Published, run: Run) -> list[str]:
    """What the task was told otherwise; numbers and data that a run has no setting for are not in it."""
    said = [
        _differs(key, run.settings[key], theirs)
        for key, theirs in of.expects.items()
        if key in run.settings and run.settings[key] != theirs
    ]
    if run.task == "finetune" and (steps := run.numbers.get("best_step")) is not None:
        batch = run.config["task"].get("batch_size")
        said.append(
            f"best after {int(steps.value):,} steps of {batch} images (the paper does not say how many it took)"
        )
    if run.task == "finetune" or run.config["task"].get("solver") == "sgd":
        said.append("not trained again with the validation images (paper: yes)")
    if (precision := run.settings.get("trainer.precision")) != PRECISION:
        said.append(f"precision {precision} (paper: float32)")
    if (place := run.config["data"].get("path")) is not None and Path(str(place)).is_absolute():
        said.append(f"images from a copy, {Path(str(place)).name}")
    return said


def _pretraining(of: Published, run: Run) -> list[str]:
    """How the weights were trained otherwise, by the record of the run that made them."""
    recipe = next((r for r in RECIPES.values() if (r.model, r.objective, r.resolution) ==
                   (of.method, of.objective, of.resolution)), None)  # fmt: skip
    if recipe is None or _from_scratch(run) or of.scratch:
        return []
    first = run if run.task == "pretrain" else run.start.pretraining
    tuned = [before.folder.name for before in run.start.runs if before.task == "finetune"]
    said = [f"weights fine-tuned before ({', '.join(tuned)})"] if tuned else []
    if first is None:
        step = run.start.origin.get("step")
        known = f"; they say step {step:,}" if step else ""
        return [*said, f"not known: {run.start.unknown or 'how its weights were trained'}{known}"]
    task, data, theirs = first.config["task"], first.config["data"], recipe.expects
    if not all(type(before.config["task"].get(key)) is int for before in (first, *made_by(run)) for key in LENGTH):
        return [*said, f"not known: how long its weights were trained ({first.folder.name} does not say)"]
    seen, name, side = images_seen(run, first), data.get("name"), data.get("resolution")
    ours = (seen, name, side, task["steps"], task["batch_size"])
    paper = recipe.images, theirs["data.name"], recipe.resolution, theirs["task.steps"], theirs["task.batch_size"]
    if ours != paper:
        said.append(f"pretrained on {_length(*ours)} (paper: {_length(*paper)})")
    told = ["data.name", "data.resolution", "task.steps", "task.batch_size"]
    of_data = [key for key in theirs if key.startswith("data.") and name != theirs["data.name"]]
    keys = [key for key in theirs if key not in (*told, *of_data)]
    others = [
        _differs(
            key, first.settings[key], theirs[key], "" if recipe.confirmed or "rate" not in key else ", from memory"
        )
        for key in keys
        if first.settings.get(key, theirs[key]) != theirs[key]
    ]
    if first is not run and (precision := first.settings.get("trainer.precision")) != PRECISION:
        others.append(f"precision {precision} (paper: float32)")
    if others:
        said.append(f"in pretraining {', '.join(others)}")
    fits_palette = ("kmeans.fit_cached", "kmeans.fitted")  # the latter in older runs
    if of.table == "loss" and str(first.settings.get("tokens.palette._target_")).endswith(fits_palette):
        said.append("a palette of its own (paper: OpenAI's, whose losses do not compare)")
    return said


def _length(seen: int, data: str, side: int, steps: int, batch: int) -> str:
    return f"{seen:,} images of {data}, {side}×{side}, in {steps:,} steps of {batch}"


def made_by(run: Run) -> list[Run]:
    """The pretraining runs that a run's weights went through, the last one first."""
    return [before for before in run.start.runs if before.task == "pretrain"]


def images_seen(run: Run, first: Run) -> int:
    """How many images the weights saw in pretraining, up to the checkpoint that was taken."""
    made = [run] if run is first else made_by(run)
    total = sum(int(before.config["task"]["steps"]) * int(before.config["task"]["batch_size"]) for before in made)
    last, step = made[0].config["task"], run.start.origin.get("step")
    if run is not first and run.start.runs[0] is made[0] and isinstance(step, int):
        total -= (int(last["steps"]) - step) * int(last["batch_size"])
    return total


def _images(of: Published, number: Number, run: Run) -> list[str]:
    """Whether it was measured on as many images as the paper has."""
    theirs = TEST_IMAGES.get(of.dataset or "")
    n = next((own.n for own in (value_of(run, of.key)[0],) if own is not None), number.n)
    if of.table == "low_data" or theirs is None or n == theirs:
        return []
    return [f"on {n:,} images (paper: {theirs:,})"]


def _differs(key: str, ours: Any, theirs: Any, doubt: str = "") -> str:
    return f"{key} {_shown(ours)} (paper{doubt}: {_shown(theirs)})"


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
