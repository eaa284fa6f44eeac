"""Builds, in flow order, what a task needs, runs it and reports its result. The only place that knows all stages."""

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from igpt.arguments import suggestion
from igpt.checkpoint import native
from igpt.checkpoint.native import Origin, Weights
from igpt.checkpoint.resume import latest_checkpoint
from igpt.data.source import Source
from igpt.metric.result import Result
from igpt.model.gpt import GPT
from igpt.objective import named
from igpt.objective.base import Objective
from igpt.report import loggers
from igpt.report.folder import RunFolder, identity, result_of
from igpt.report.table import closing_table
from igpt.task.fit import Machine, Runner
from igpt.task.guard import NonFiniteLossError
from igpt.task.sample import vocabulary_of
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.palette import Palette
from igpt.tokens.raster import Raster

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"  # the option of model, tokens and objective that says: as in the weights of init=


def main(cfg: DictConfig) -> None:
    """One command: runs it, and ends with exit code 2 and one line when the input was bad."""
    set_up_logging()
    choices = dict(HydraConfig.get().runtime.choices)
    overrides = list(HydraConfig.get().overrides.task)
    try:
        launch(cfg, choices=choices, overrides=overrides)
    except (ValueError, NonFiniteLossError, OSError) as error:
        log.debug("traceback", exc_info=True)
        log.error("error: %s", error)
        sys.exit(2)


def launch(cfg: DictConfig, *, choices: dict[str, Any], overrides: list[str]) -> Result:
    """Runs a composed config in its run folder; a finished identical run is not repeated, its result is returned."""
    build = Build(cfg, choices)
    folder = open_folder(build)
    if folder.finished:
        record = folder.read_result()
        result = result_of(record)
        log.info(
            "%s is finished; force=true repeats it\n%s",
            folder.path,
            closing_table(result, folder.path, record["seconds"]),
        )
        return result
    folder.start(build.config, overrides)
    with log_file(folder.path / "log.txt"):
        log.info("%s in %s", build.task, folder.path)
        return perform(build, folder)


def open_folder(build: "Build") -> RunFolder:
    """The folder of this run, fixed before anything starts.

    Raises:
        ValueError: an unfinished run of this name that has checkpoints, or a `resume=` that is another run.
    """
    cfg = build.cfg
    name = build.name
    if cfg.resume is not None:
        folder = RunFolder(Path(cfg.resume))
        saved = folder.read_run()["config"]
        if not folder.path.resolve().name.startswith(name):
            differs = [key for key in build.config if saved.get(key) != build.config[key]]
            raise ValueError(
                f"resume={cfg.resume}: this run differs from the saved one in {', '.join(differs) or 'its weights'}"
            )
        return folder
    folder = RunFolder(Path(cfg.paths.runs) / name)
    if cfg.force:
        repeat = 2
        while folder.started:
            folder = RunFolder(Path(cfg.paths.runs) / f"{name}-{repeat}")
            repeat += 1
    elif folder.started and not folder.finished and any(folder.path.rglob("latest")):
        raise ValueError(
            f"{folder.path} was begun and is not finished: continue it with `python train.py resume={folder.path}`, "
            f"or repeat it in a new folder with force=true"
        )
    return folder


def perform(build: "Build", folder: RunFolder) -> Result:
    """Builds what the task needs, runs it, writes and shows its result."""
    start = time.perf_counter()
    settings = OmegaConf.to_container(build.cfg.task, resolve=True)
    assert isinstance(settings, dict)
    needs = {need: getattr(build, f"need_{need}")(folder) for need in settings.pop("needs")}
    settings.pop("name")
    run = instantiate({**settings, "_partial_": True, "_convert_": "all"})
    failed = True
    try:
        result: Result = run(**needs)
        failed = False
    finally:
        loggers.close(failed)
    seconds = time.perf_counter() - start
    folder.finish(build.task, result, seconds=seconds)
    log.info("%s\n%s", build.task, closing_table(result, folder.path, seconds))
    return result


class Build:
    """Everything a task may need, built from a config when it is first asked for.

    What one stage knows is given to the next: positions and vocabulary come from the tokens, causality from the
    objective. Where weights are given, they must agree.
    """

    def __init__(self, cfg: DictConfig, choices: dict[str, Any]) -> None:
        self.cfg, self.choices = cfg, choices
        self.task: str = cfg.task.name
        self.weights: Weights | None = native.find(cfg.init) if cfg.init is not None else None
        needs = set(cfg.task.needs)
        from_checkpoint = [group for group in ("model", "tokens", "objective") if choices.get(group) == CHECKPOINT]
        if self.weights is None and from_checkpoint and needs & {"weights", "net"}:
            raise ValueError(f"task={self.task} needs trained weights: init=RUN_FOLDER (of a finished pretraining run)")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole config, resolved."""
        resolved = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    @property
    def name(self) -> str:
        """The run folder's name: what is done with what, and 8 digits of the config's hash."""
        cfg, origin = self.cfg, self.weights.origin if self.weights else None
        model = cfg.model.name if self.choices["model"] != CHECKPOINT else (origin.model if origin else "none")
        objective = (
            cfg.objective.name
            if self.choices["objective"] != CHECKPOINT
            else (origin.objective["name"] if origin else "none")
        )
        digest = identity(self.config, self.weights.sha256 if self.weights else None)
        return f"{self.task}-{model}-{cfg.data.name}{cfg.data.resolution}-{objective}-s{cfg.seed}-{digest}"

    @cached_property
    def source(self) -> Source:
        source: Source = instantiate(self.cfg.data.source)
        return source

    @cached_property
    def palette(self) -> Palette:
        if self.choices["tokens"] == CHECKPOINT:
            return self.vocabulary[0]
        palette: Palette = instantiate(self.cfg.tokens.palette)(self.source)
        if self.weights is not None and palette.hash != self.vocabulary[0].hash:
            theirs = self.vocabulary[0]
            raise ValueError(
                f"{self.weights.folder} was trained with palette {theirs.hash} ({theirs.k} colours), "
                f"this run's is {palette.hash} ({palette.k}): tokens=checkpoint takes the checkpoint's"
            )
        return palette

    @cached_property
    def raster(self) -> Raster:
        if self.choices["tokens"] != CHECKPOINT:
            raster = Raster.of(self.cfg.data.resolution, self.cfg.tokens.order)
        else:
            raster = self.vocabulary[1]
        if self.weights is not None:
            theirs = self.vocabulary[1]
            if theirs.side != self.cfg.data.resolution:
                raise ValueError(
                    f"{self.weights.folder} reads {theirs.side}×{theirs.side} pixels ({self.weights.origin.data}), "
                    f"data={self.cfg.data.name} gives {self.cfg.data.resolution}×{self.cfg.data.resolution}"
                )
            if theirs.permutation != raster.permutation:
                raise ValueError(
                    f"{self.weights.folder} was trained in another order of the pixels: tokens=checkpoint takes it"
                )
        return raster

    @cached_property
    def vocabulary(self) -> tuple[Palette, Raster]:
        assert self.weights is not None
        return vocabulary_of(self.weights)

    @cached_property
    def objective(self) -> Objective:
        settings = self.config["objective"]
        if self.weights is not None and self._from_weights("objective"):
            settings = self.weights.origin.objective
        elif self.weights is not None:
            native.check_same("objective", self.weights.origin.objective, settings, self.weights.folder)
        return named.build(**settings)

    def _from_weights(self, group: str) -> bool:
        return bool(self.choices[group] == CHECKPOINT)

    # What a task lists under `needs`, each given the run folder.

    def need_runner(self, folder: RunFolder) -> Runner:
        machine: Machine = instantiate(self.cfg.trainer)
        at = latest_checkpoint(folder.path)
        first_step = int(at.stem.removeprefix("step_")) if at else 0
        uses_fit = "net" in self.cfg.task.needs
        chosen = self.cfg.logger.values() if uses_fit and self.cfg.logger else []
        callbacks = self.cfg.callbacks.values() if uses_fit and self.cfg.callbacks else []
        run_id = f"{self.name}-{folder.read_run()['id']}"
        opened = [instantiate(logger)(folder.path, run_id=run_id, first_step=first_step) for logger in chosen]
        for logger in opened:
            logger.log_hyperparams(self.config)
        return Runner(
            machine=machine,
            folder=folder.path,
            loggers=opened,
            callbacks=[instantiate(callback) for callback in callbacks],
        )

    def need_tokens(self, folder: RunFolder) -> Callable[..., TokenDataModule]:
        return partial(
            TokenDataModule,
            source=self.source,
            palette=self.palette,
            raster=self.raster,
            seed=self.cfg.seed,
            num_workers=self.cfg.trainer.num_workers,
        )

    def need_net(self, folder: RunFolder) -> Callable[[], GPT]:
        known = {"n_ctx": self.raster.n_ctx, "n_vocab": self.palette.k, "causal": self.objective.causal}
        if self._from_weights("model"):
            assert self.weights is not None
            return partial(GPT, **{**self.weights.origin.network, **known})
        spec = {key: value for key, value in self.config["model"].items() if key != "name"}
        net: Callable[[], GPT] = instantiate({**spec, **known})
        if self.weights is not None:
            asked = {key: value for key, value in spec.items() if not key.startswith("_")} | known
            native.check_same("network", self.weights.origin.network, asked, self.weights.folder)
        return net

    def need_objective(self, folder: RunFolder) -> Objective:
        return self.objective

    def need_weights(self, folder: RunFolder) -> Weights | None:
        return self.weights

    def need_seed(self, folder: RunFolder) -> int:
        return int(self.cfg.seed)

    def need_folder(self, folder: RunFolder) -> Path:
        return folder.path

    def need_init(self, folder: RunFolder) -> str | None:
        return self.cfg.init  # type: ignore[no-any-return]

    def need_origin(self, folder: RunFolder) -> Callable[..., Origin]:
        """What the weights this run will make are to say of themselves, but for their step."""
        return partial(
            Origin,
            network=self.need_net(folder).keywords,  # type: ignore[attr-defined]
            palette=self.palette.centres.tolist(),
            permutation=list(self.raster.permutation),
            objective=self.config["objective"],
            model=self.cfg.model.name,
            data=f"{self.cfg.data.name}{self.cfg.data.resolution}",
            seed=self.cfg.seed,
        )

    def need_stage(self, folder: RunFolder) -> Callable[..., Result]:
        """Runs one stage of a pipeline; every stage's settings are checked before the first one starts."""
        configs = {name: self._stage_config(name, settings) for name, settings in self.cfg.task.stages.items()}

        def stage(name: str, _: Mapping[str, Any], *, folder: Path, init: str | None) -> Result:
            cfg, choices = configs[name]
            place = RunFolder(folder)
            if place.finished:
                log.info("%s is finished", place.path)
                return result_of(place.read_result())
            cfg.init = init
            build = Build(cfg, choices)
            place.start(build.config, [])
            return perform(build, place)

        return stage

    def _stage_config(self, name: str, settings: DictConfig) -> tuple[DictConfig, dict[str, Any]]:
        """This run's config with another task, and what that task takes from a checkpoint."""
        task = settings.get("task", name)
        fresh = hydra.compose("config", overrides=[f"task={task}"], return_hydra_config=True)
        choices = dict(fresh.hydra.runtime.choices)
        cfg = self.cfg.copy()
        with open_dict(cfg):
            cfg.task = fresh.task
            for group in ("model", "tokens", "objective"):
                if choices[group] == CHECKPOINT:
                    cfg[group] = fresh[group]
                else:
                    choices[group] = self.choices[group]
        for key, value in settings.items():
            if key == "task":
                continue
            if key not in cfg.task:
                raise ValueError(
                    f"task.stages.{name} has no setting {key!r}{suggestion(str(key), [str(k) for k in cfg.task])}"
                )
            cfg.task[key] = value
        OmegaConf.set_struct(cfg, True)
        return cfg, choices


def set_up_logging() -> None:
    """Messages to the terminal, in plain words; libraries speak only when something is wrong."""
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    # a bar shows the same on a terminal
    console.addFilter(lambda record: not (getattr(record, "progress", False) and sys.stderr.isatty()))
    root = logging.getLogger()
    root.handlers = [console]
    root.setLevel(logging.WARNING)
    logging.getLogger("igpt").setLevel(logging.DEBUG)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning's own use of PyTorch, nothing a user can mend
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*", module="lightning.*")


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Everything logged while the block lasts, appended to a file with its time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException as error:
        logging.getLogger(__name__).debug("stopped by %s", type(error).__name__, exc_info=True)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
