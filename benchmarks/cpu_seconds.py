"""CPU seconds of a run, by stage and by what they went to: arithmetic, or everything around it.

    OMP_NUM_THREADS=1 python benchmarks/cpu_seconds.py experiment=quickstart trainer=cpu

The arguments are those of `train.py`. Seconds are user and system time of the process, so that other work on the
machine does not count. Each second counts once, for the innermost part. Steps of training, evaluation and sampling, and
fits of classifiers, are arithmetic.
"""

import builtins
import importlib
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

# part → functions, as module and qualified name; a function is replaced in the modules that imported it by name
PARTS: dict[str, list[tuple[str, str]]] = {
    "arithmetic": [
        *(
            ("lightning.pytorch.strategies.strategy", f"Strategy.{name}")
            for name in ("optimizer_step", "training_step", "validation_step", "predict_step", "test_step")
        ),
        ("igpt.probe.selection", "logistic_regression"),
        ("igpt.probe.selection", "_predict"),
        ("igpt.task.sample", "generate"),
        ("igpt.training.callbacks", "generate"),
    ],
    "configuration": [("hydra._internal.config_loader_impl", "ConfigLoaderImpl.load_configuration")],
    "figures": [
        ("matplotlib.layout_engine", "ConstrainedLayoutEngine.execute"),
        ("matplotlib.figure", "Figure.savefig"),
        ("PIL.Image", "Image.save"),
    ],
    "pages": [("igpt.run.execute", "write_page")],
    "checkpoints": [("lightning.pytorch.trainer.trainer", "Trainer.save_checkpoint")],
}
STAGE = ("igpt.run.execute", "run_and_report")  # its first argument has the stage's folder
IMPORTS, REST, BEFORE = "imports", "rest", "start, end"
COLUMNS = ("arithmetic", IMPORTS, "configuration", "figures", "pages", "checkpoints", REST)


class Meter:
    """Adds up CPU seconds as (stage, part)."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.parts, self.stages = [REST], [BEFORE]
        self.pending = {(STAGE, "")} | {(place, part) for part, places in PARTS.items() for place in places}
        self.last = 0.0  # so that the start of the interpreter counts, too

    def charge(self) -> None:
        """Gives the seconds since the last call to the innermost part."""
        now = time.process_time()
        self.seconds[self.stages[-1], self.parts[-1]] += now - self.last
        self.last = now

    def measure(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, its seconds counted as `part`; inside imports they stay imports."""

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            self.parts.append(part)
            if is_stage := not part:
                self.parts[-1] = REST
                self.stages.append(args[0].run_dir.name)
            try:
                return function(*args, **kwargs)
            finally:
                self.charge()
                self.parts.pop()
                if is_stage:
                    self.stages.pop()

        return measured

    def measure_imports(self) -> None:
        """Counts every import, and wraps the functions of `PARTS` once their modules are loaded."""
        plain, plain_module = builtins.__import__, importlib.import_module

        def load(through: Callable[..., ModuleType], *args: Any, **kwargs: Any) -> ModuleType:
            if self.parts[-1] == IMPORTS:
                return through(*args, **kwargs)
            self.charge()
            self.parts.append(IMPORTS)
            try:
                return through(*args, **kwargs)
            finally:
                self.wrap_loaded()
                self.charge()
                self.parts.pop()

        builtins.__import__ = lambda *args, **kwargs: load(plain, *args, **kwargs)
        importlib.import_module = lambda *args, **kwargs: load(plain_module, *args, **kwargs)

    def wrap_loaded(self) -> None:
        """Wraps the functions whose modules have been imported."""
        for place, part in list(self.pending):
            module, name = place
            owner: Any = sys.modules.get(module)
            *classes, attribute = name.split(".")
            for each in classes:
                owner = getattr(owner, each, None)
            if owner is None or not hasattr(owner, attribute):
                continue
            self.pending.remove((place, part))
            setattr(owner, attribute, self.measure(getattr(owner, attribute), part))


def main() -> None:
    """Runs the command line under the meter, then prints the table."""
    meter = Meter()
    meter.measure_imports()
    from igpt.cli import main as run_command

    try:
        run_command()
    finally:
        meter.charge()
        print(format_table(meter.seconds))
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"other processes that it started: {children.ru_utime + children.ru_stime:.1f}")


def format_table(seconds: dict[tuple[str, str], float]) -> str:
    """CPU seconds of (stage, part) as a Markdown table, the sums last."""
    stages = list(dict.fromkeys(stage for stage, _ in seconds))
    rows = [[stage, *(seconds.get((stage, part), 0.0) for part in COLUMNS)] for stage in stages]
    rows.append(["sum", *(sum(row[i + 1] for row in rows) for i in range(len(COLUMNS)))])
    lines = [f"| CPU seconds | {' | '.join(COLUMNS)} | all but arithmetic |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines += [f"| {row[0]} | {' | '.join(f'{x:.1f}' for x in [*row[1:], sum(row[2:])])} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
