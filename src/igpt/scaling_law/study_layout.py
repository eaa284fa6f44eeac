"""The layout of a scaling study: which size is trained for how many steps at which budget, from counted operations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from igpt.metric.throughput import count_steps, train_flops_per_image
from igpt.model.config import GPTConfig
from igpt.scaling_law.parabola import LEAST
from igpt.scaling_law.study import Row, format_count
from igpt.scaling_law.study_points import count_network_weights


@dataclass(frozen=True)
class StudySize:
    """A network of a study, and the recipe of its pretraining."""

    network: GPTConfig
    batch_size: int
    warmup_steps: int


@dataclass(frozen=True)
class PlannedRun:
    """One pretraining of a study."""

    budget: float
    name: str  # of the size
    weights: int
    steps: int
    images: int
    operations: float  # counted
    tokens_per_weight: float


def plan_study(
    budgets: Sequence[float], sizes: Mapping[str, StudySize], *, tokens_per_weight: tuple[float, float] | None
) -> list[PlannedRun]:
    """The runs of a study, by budget and size. `tokens_per_weight`: sizes outside are left out at a budget; None: none.

    Raises:
        ValueError: a budget that stands twice, two sizes that are one network, fewer than three sizes at a budget, or
            no more steps than the warm-up has.
    """
    if not budgets or min(budgets) <= 0 or len(set(budgets)) < len(budgets):
        raise ValueError(f"hydra.sweeper.budgets must be different operations above 0, got {[*budgets]}")
    owners: dict[str, str] = {}
    for name, size in sizes.items():
        if (other := owners.setdefault(repr(size.network), name)) != name:
            raise ValueError(f"hydra.sweeper.sizes: {other} and {name} are the same network: leave one out")
    low, high = tokens_per_weight or (0.0, float("inf"))
    planned = []
    for budget in sorted(budgets):
        every = [_plan_run(budget, name, size) for name, size in sizes.items()]
        runs = [run for run in every if low <= run.tokens_per_weight <= high]
        if len(runs) < LEAST:
            raise ValueError(
                f"hydra.sweeper.sizes: the budget of {budget:.3g} operations has {len(runs)} sizes"
                f"{'' if tokens_per_weight is None else f' of {low:g} to {high:g} tokens a weight'}, a parabola needs "
                f"{LEAST}: add sizes"
            )
        for run in runs:
            if run.steps <= (warmup := sizes[run.name].warmup_steps):
                raise ValueError(
                    f"hydra.sweeper.budgets: {budget:.3g} operations are {run.steps} steps of {run.name}, and the "
                    f"warm-up has {warmup}: leave this size out (hydra.sweeper.tokens_per_weight), or warm up shorter"
                )
        planned += sorted(runs, key=lambda run: run.weights)
    return planned


def _plan_run(budget: float, name: str, size: StudySize) -> PlannedRun:
    flops = train_flops_per_image(size.network)
    weights, _ = count_network_weights(size.network)
    steps = count_steps(budget, flops, size.batch_size)
    images = steps * size.batch_size
    return PlannedRun(budget, name, weights, steps, images, images * flops, images * size.network.n_ctx / weights)


def list_plan(planned: Sequence[PlannedRun], n_train: int | None) -> list[Row]:
    """Rows of text, the heading first. `n_train`: training images, for the epochs; None: a stream."""
    rows: list[Row] = [("budget, FLOP", "size", "weights", "steps", "images", "epochs", "tokens a weight")]
    for run in planned:
        epochs = "–" if n_train is None else format_count(run.images / n_train)
        counts = format_count(run.weights), f"{run.steps:,}", f"{run.images:,}", epochs
        rows.append((f"{run.budget:.3g}", run.name, *counts, format_count(run.tokens_per_weight)))
    return rows
