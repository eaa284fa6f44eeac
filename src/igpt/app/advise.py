"""`task=advise`: which size and how many images for an amount of compute, from the fits of a scaling study."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
from hydra.core.global_hydra import GlobalHydra

from igpt.app.isoflop import POINTS
from igpt.distributed import ranks
from igpt.metric.result import Number, Result
from igpt.metric.throughput import count_steps, train_flops_per_image
from igpt.model.config import GPTConfig
from igpt.report.closing_table import align_columns
from igpt.run.components import Components
from igpt.run.recipes import CHECKPOINT
from igpt.scaling_law.study import Row, TargetFit, fit_study, format_count, format_interval
from igpt.scaling_law.study_points import StudyPoint, count_network_weights
from igpt.settings.reading import AdviseSettings, IsoflopSettings
from igpt.utils import files

WIDTHS = 8  # a suggested width is a multiple of this
FAR = 10  # times the largest measured budget: warned of in capitals from here on
REPEATED = 4  # epochs up to which repeated data is worth about as much as new (Muennighoff et al. 2023, of text)
OF_STUDY = ("weights", "width", "huber", "bootstrap")  # settings of task=isoflop that decide its fits


class Shape(NamedTuple):
    """A network that may be trained."""

    name: str
    network: GPTConfig
    n: int  # weights, of the kind that the study counts


def run(components: Components, settings: AdviseSettings) -> Result:
    """Writes `advice.txt` (also logged): for each target the size, images, steps and the expected value.

    Raises:
        ValueError: `task.study` is no finished task=isoflop, or has no exponents.
    """
    if settings.study is None:
        raise ValueError("task.study is not given: the run folder of a finished task=isoflop")
    found, where = components.run.finished_runs, f"task.study={settings.study}"
    if not found.runs or found.runs[0].task != "isoflop":
        why = next(iter(found.problems.values()), "it is no run of task=isoflop")
        raise ValueError(f"{where}: {why}; give the run folder of a finished task=isoflop")
    study = found.runs[0]
    points = read_study(study.folder / study.files_inside.get("points", Path(POINTS)), where)
    task = {key: value for key, value in study.config["task"].items() if key in IsoflopSettings.model_fields}
    fits = fit_study(points, task["targets"], **{key: task[key] for key in OF_STUDY}, seed=int(study.config["seed"]))
    operations = settings.operations or count_operations(points, settings)
    result, blocks = Result(), [f"{operations:.3g} FLOP, by {study.folder.name}"]
    for fit in fits:
        rows, numbers = advise(fit, points, operations, weights=task["weights"])
        result.numbers |= numbers
        optima = [
            f"N* by the {key.rpartition('_')[2]}: {format_count(number.value)}{format_interval(number.interval)}"
            for key, number in numbers.items()
            if "/weights_by_" in key
        ]
        title = "; ".join([f"{fit.name}: {fit.label}", *optima])
        blocks += [title, align_columns(rows) if rows else "; ".join(fit.remarks)]
    if not result.numbers:
        raise ValueError(f"{where} has no exponents: {'; '.join(fits[0].remarks)}")
    if warning := describe_reach(points, operations, result):
        result.provenance["warning"] = warning
    result.files["advice"] = Path("advice.txt")
    if ranks.this_rank().is_first:
        with files.atomic_write(components.run_dir / "advice.txt") as file:
            file.write(("\n\n".join(blocks) + "\n").encode())
    return result


def read_study(path: Path, where: str) -> list[StudyPoint]:
    """The points that task=isoflop wrote. Raises ValueError where they are missing or damaged."""
    try:
        return [StudyPoint.from_dict(saved) for saved in files.read_json(path)]
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{where}: {path.name} cannot be read ({error!s:.80}): run task=isoflop again") from error


def count_operations(points: Sequence[StudyPoint], settings: AdviseSettings) -> float:
    """The operations of `hours` at `speed`, or at that of the study's fastest run."""
    assert settings.hours is not None, "its settings have been checked"
    speeds = [
        train_flops_per_image(GPTConfig.from_dict(point.network)) * point.batch_size / point.step_seconds
        for point in points
        if point.step_seconds
    ]
    if settings.speed is None and not speeds:
        raise ValueError("task.hours needs task.speed, in FLOP/s: the runs of the study have not measured theirs")
    return settings.hours * 3600 * (settings.speed or max(speeds))


def advise(
    fit: TargetFit, points: Sequence[StudyPoint], operations: float, *, weights: str
) -> tuple[list[Row], dict[str, Number]]:
    """Rows of text, the heading first, and numbers; none where the fit has neither exponents nor a surface.

    First a network like the study's at the optimum, then the nearest sizes of conf/model/ below and above it. Up to the
    largest budget of the study that is the parabolas' optimum, whose minima were measured, beyond it the surface's;
    where only one of both is fitted, that.
    """
    law, surface, name = fit.minima.of_weights, fit.surface, fit.name
    n_run = len(fit.samples.values)
    optima: dict[str, Number] = {}
    if surface is not None and surface.is_determined:
        value, interval = surface.find_optimum(operations)
        optima["surface"] = Number(value, "weights", n_run, interval=interval)
    if law is not None:
        interval = law.predict_interval(operations)
        optima["parabolas"] = Number(law.predict(operations), "weights", n_run, interval=interval)
    if not optima:
        return [], {}
    numbers = {f"{name}/weights_by_{method}": number for method, number in optima.items()}
    is_inside = operations <= max(point.operations for point in points)
    chosen = "parabolas" if "parabolas" in optima and (is_inside or "surface" not in optima) else "surface"
    best = optima[chosen].value
    suggested = suggest_shape(points, best, weights=weights)
    batch_size, known = points[-1].batch_size, [point.train_images for point in points if point.train_images]
    heading = ("network", "layers × width, heads", "weights", "images", f"steps of {batch_size}", "epochs",
               "tokens a weight", "expected [95 %]")  # fmt: skip
    rows: list[Row] = [heading]
    for shape in (suggested, *list_nearest_options(points, best, weights=weights)):
        steps = count_steps(operations, train_flops_per_image(shape.network), batch_size)
        images, config = steps * batch_size, shape.network
        tokens = float(images * config.n_ctx)
        expected = "–"
        if "surface" in optima and surface is not None:
            value, interval = surface.predict(shape.n, tokens)
            expected = f"{value:.4f}" + ("" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]")
            if shape is suggested:
                numbers[f"{name}/expected"] = Number(value, fit.label, n_run, interval=interval)
        if shape is suggested:
            numbers |= {
                f"{name}/n_layer": Number(config.n_layer, "blocks", 1),
                f"{name}/n_embd": Number(config.n_embd, "width", 1),
                f"{name}/images": Number(images, "images", images),
                f"{name}/steps": Number(steps, f"steps of {batch_size} images", 1),
            }
        epochs = f"{images / known[0]:.3g}" if known else "–"
        sizes = f"{config.n_layer} × {config.n_embd}, {config.n_head}"
        cells = f"{format_count(shape.n)}", format_count(images), format_count(steps), epochs, f"{tokens / shape.n:.0f}"
        rows.append((shape.name, sizes, *cells, expected))
    return rows, numbers


def suggest_shape(points: Sequence[StudyPoint], n: float, *, weights: str) -> Shape:
    """A network of about `n` weights: depth and head size follow the study's sizes (lines in log N), width gives n."""
    logs = np.log([[point.count_weights(weights), *point.sizes.values()] for point in points])  # N, L, C, H
    depth = np.polyval(np.polyfit(logs[:, 0], logs[:, 1], 1), np.log(n))
    head = np.polyval(np.polyfit(logs[:, 0], logs[:, 2] - logs[:, 3], 1), np.log(n))
    n_layer, head_size = max(1, round(math.exp(depth))), min(max(math.exp(head), 4), 128)
    base = GPTConfig.from_dict(points[0].network)

    def build(n_embd: int) -> Shape:
        heads = [h for h in range(1, n_embd + 1) if n_embd % h == 0]
        n_head = min(heads, key=lambda h: abs(math.log(n_embd / h / head_size)))
        network = replace(base, n_layer=n_layer, n_embd=n_embd, n_head=n_head)
        return Shape("like the study's", network, count_network_weights(network)[weights != "all"])

    low, high = 1, 2  # multiples of WIDTHS
    while build(high * WIDTHS).n < n:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if build(middle * WIDTHS).n < n else (low, middle)
    return min((build(low * WIDTHS), build(high * WIDTHS)), key=lambda shape: abs(math.log(shape.n / n)))


def list_nearest_options(points: Sequence[StudyPoint], n: float, *, weights: str) -> list[Shape]:
    """The sizes of conf/model/ next below and next above `n` weights, with the study's tokens."""
    shapes = []
    base = GPTConfig.from_dict(points[0].network)
    for option in GlobalHydra.instance().config_loader().get_group_options("model"):
        if option == CHECKPOINT or option.startswith("_"):
            continue
        model = hydra.compose("config", overrides=[f"model={option}"]).model
        network = replace(base, **{key: model[key] for key in ("n_layer", "n_embd", "n_head")})
        shapes.append(Shape(f"model={option}", network, count_network_weights(network)[weights != "all"]))
    below = sorted((shape for shape in shapes if shape.n <= n), key=lambda shape: -shape.n)[:1]
    return below + sorted((shape for shape in shapes if shape.n > n), key=lambda shape: shape.n)[:1]


def describe_reach(points: Sequence[StudyPoint], operations: float, result: Result) -> str:
    """How far the advice lies outside the measured budgets and epochs, in a line; "" inside."""
    budgets, remarks = [point.operations for point in points], []
    if (beyond := operations / max(budgets)) > 1.1:
        times = f"{beyond:,.0f} times" if beyond >= FAR else f"{beyond:.1f} times"
        reach = f"extrapolated: {times} the largest measured budget ({max(budgets):.3g} FLOP)"
        remarks.append(
            (reach.upper() if beyond >= FAR else reach)
            + "; intervals hold the runs' noise, not whether the law goes on"
        )
    elif operations < min(budgets) / 1.1:
        remarks.append(f"extrapolated: below the smallest measured budget ({min(budgets):.3g} FLOP)")
    epochs = [point.images / point.train_images for point in points if point.train_images]
    images = [number.value for key, number in result.numbers.items() if key.endswith("/images")]
    if epochs and (most := max(images) / next(p.train_images for p in points if p.train_images)) > max(
        REPEATED, *epochs
    ):
        remarks.append(
            f"every image is seen {most:.0f} times, in the study at most {max(epochs):.1f} times: take more images"
        )
    return "; ".join(remarks)
