"""Hydra sweeper plugins `hydra/sweeper=in_turn`, `optuna` and `isoflop`; Hydra finds plugins in this package."""

from functools import partial
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _Search(Sweeper):
    """Launches jobs, reads their metrics, launches more; see `igpt.run.search` and `igpt.run.isoflop_sweep`."""

    kind: str

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.context = config, hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from igpt.run import isoflop_sweep, search  # lazy: Hydra imports this file at every start

        assert self.config is not None
        compose = partial(self.context.config_loader.load_sweep_config, self.config)
        run = getattr(isoflop_sweep if self.kind == "isoflop" else search, self.kind)
        return run(self.config, arguments, launch=self.launcher.launch, compose=compose, **self.settings)


class InTurnSweeper(_Search):
    """Tries one value after another until the metric gets worse."""

    kind = "in_turn"


class OptunaSweeper(_Search):
    """Tries values proposed by Optuna's TPE."""

    kind = "optuna"


class IsoflopSweeper(_Search):
    """Pretrains every size at every budget of operations, then fits the scaling study."""

    kind = "isoflop"
