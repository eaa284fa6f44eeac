"""Hydra sweeper plugins `hydra/sweeper=in_turn` and `optuna`; Hydra finds plugins in this package."""

from functools import partial
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _Search(Sweeper):
    """Launches jobs, reads their metrics, launches more; see `igpt.run.search`."""

    kind: str

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.context = config, hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from igpt.run import search  # lazy: Hydra imports this file at every start

        assert self.config is not None
        compose = partial(self.context.config_loader.load_sweep_config, self.config)
        run = getattr(search, self.kind)
        return run(self.config, arguments, launch=self.launcher.launch, compose=compose, **self.settings)


class InTurnSweeper(_Search):
    """Tries one value after another until the metric gets worse."""

    kind = "in_turn"


class OptunaSweeper(_Search):
    """Tries values proposed by Optuna's TPE."""

    kind = "optuna"
