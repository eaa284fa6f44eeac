"""Hydra launcher plugin `hydra/launcher=processes`, the default; Hydra finds plugins in this package."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessesLauncher(Launcher):
    """Runs every job of a sweep as a `python train.py …` process; see `igpt.run.sweep`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from igpt.run.init_defaults import complete_job  # lazy: Hydra imports this file at every start
        from igpt.run.sweep import launch

        load = partial(self.context.config_loader.load_sweep_config, self.config)
        configs = [complete_job(load, list(overrides)) for overrides in job_overrides]
        return launch(self.config, configs, first=initial_job_idx, **self.settings)
