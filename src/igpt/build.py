"""Everything a task may need, built in flow order from a config; what one stage knows is given to the next."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from igpt import inputs
from igpt.checkpoint import native
from igpt.checkpoint.find import find
from igpt.checkpoint.native import CheckpointMetadata, Weights
from igpt.checkpoint.resume import step_of
from igpt.data.crop import Crop, evaluation_crop
from igpt.data.listing import list_files
from igpt.data.source import Source
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.objective import registry
from igpt.objective.base import Objective
from igpt.report.folder import RunFolder, identity
from igpt.report.loggers import About
from igpt.report.runs import Found, brief, found
from igpt.settings import factory, without
from igpt.task.fit import Runner
from igpt.task.machine import Machine, hold_memory
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.tokenizer import Tokenizer, TokenizerSettings

CHECKPOINT = "checkpoint"  # the option of model, tokens and objective that says: as in the weights of init=


class Build:
    """The stages of one config, each built when it is first asked for.

    Positions and vocabulary come from the tokens, causality from the objective. Where weights are given, they must
    agree with what the run chooses, and are taken where it chooses nothing.
    """

    def __init__(self, cfg: DictConfig, choices: dict[str, Any]) -> None:
        self.cfg, self.choices = cfg, choices
        self.list_files = cache(list_files)  # once for the run's name and for the images; anew for every run
        self.task: str = cfg.task.name
        reads_runs = "runs" in cfg.task and "found" not in cfg.task.needs  # their weights, not what they found out
        start = cfg.init if cfg.init is not None else next(iter(cfg.task.runs), None) if reads_runs else None
        lacking = cfg.task.get("stages", {}).get("import") or cfg.task  # what OpenAI's checkpoints do not say
        spec = {"palette": lacking.get("palette") or cfg.data.get("clusters"), "n_head": lacking.get("n_head")}
        self.weights: Weights | None = find(start, **spec) if start is not None else None
        if reads_runs and not cfg.task.runs:
            raise ValueError(f"task={self.task} compares runs: task.runs=[RUN_FOLDER,RUN_FOLDER], of pretraining")
        needs = set(cfg.task.needs)
        from_checkpoint = [group for group in ("model", "tokens", "objective") if choices.get(group) == CHECKPOINT]
        if self.weights is None and from_checkpoint and needs & {"weights", "net"}:
            what = (
                "OpenAI's or Hugging Face's, or a checkpoint"
                if self.task == "import"
                else "of a finished pretraining run"
            )
            raise ValueError(f"task={self.task} needs trained weights: init=PATH ({what})")
        if "tokens" in needs and choices.get("tokens") != CHECKPOINT:
            self.tokenizer_settings.sizes(cfg.data.resolution)  # refuses settings before a folder is made

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole config, resolved."""
        resolved = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    @property
    def of(self) -> dict[str, str]:
        """What the task is done with: the names of model, data and objective, and the option of `data`."""
        data = self.data_name
        if self.weights and "tokens" not in self.cfg.task.needs:  # a task that reads no images
            data = self.weights.metadata.data
        objective = self.objective_settings["name"]
        return {"model": self.model_name, "data": data, "objective": objective, "data_option": self.choices["data"]}

    @property
    def name(self) -> str:
        """The run folder's name: what is done with what, and 8 digits of the config's hash."""
        digest = identity(self.config, self.files_sha256)
        if "found" in self.cfg.task.needs:  # a task over many runs
            return f"{self.task}-{digest}"
        of = self.of
        return f"{self.task}-{of['model']}-{of['data']}-{of['objective']}-s{self.cfg.seed}-{digest}"

    @cached_property
    def files_sha256(self) -> dict[str, str | None]:
        """What is in the files that decide the run: starting weights, palettes, and (by name and size) images."""
        found = self.found.input_hashes if "found" in self.cfg.task.needs else None
        init = self.weights.sha256 if self.weights else None
        return inputs.input_hashes(self.config, init=init, found=found, list_files=self.list_files)

    @property
    def data_name(self) -> str:
        return f"{self.cfg.data.name}{self.cfg.data.resolution}"

    @property
    def model_name(self) -> str:
        return self.weights.metadata.model if self.weights and self._from_weights("model") else str(self.cfg.model.name)

    @property
    def objective_settings(self) -> dict[str, Any]:
        """The objective's name and numbers: the run's own, or those of its weights."""
        if self.weights and self._from_weights("objective"):
            return self.weights.metadata.objective
        settings: dict[str, Any] = self.config["objective"]
        return settings

    @property
    def began_with(self) -> dict[str, Any]:
        """What the weights of init= say of themselves, for the record of this run."""
        return brief(self.weights.metadata.to_dict()) if self.weights is not None else {}

    @cached_property
    def machine(self) -> Machine:
        machine: Machine = factory(self.config["trainer"], "trainer")()
        return machine

    @cached_property
    def source(self) -> Source:
        make = factory(without(self.config["data"], "n_colour"), "data")
        source: Source = make(cache=Path(self.cfg.paths.cache), list_files=self.list_files)
        return source

    @cached_property
    def tokenizer_settings(self) -> TokenizerSettings:
        settings: TokenizerSettings = factory(self.config["tokens"], "tokens")()
        return settings

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own, or that of its weights. Raises ValueError where the weights read other tokens or images."""
        theirs = self.weights.tokenizer if self.weights is not None else None
        side = self.cfg.data.resolution
        if self.weights is not None and theirs is not None and theirs.side != side:
            raise ValueError(
                f"{self.weights.folder} reads {theirs.side}×{theirs.side} pixels ({self.weights.metadata.data}), "
                f"data={self.cfg.data.name} gives {side}×{side}"
            )
        if self.choices["tokens"] == CHECKPOINT:
            assert theirs is not None, "as the constructor has seen to"
            return theirs
        ours = self.tokenizer_settings.build(self.source, Path(self.cfg.paths.cache))
        if self.weights is not None and theirs is not None and ours.hash != theirs.hash:
            raise ValueError(
                f"{self.weights.folder} was trained on other tokens ({theirs.describe()}, {theirs.hash}) than this "
                f"run's ({ours.describe()}, {ours.hash}): tokens=checkpoint takes the checkpoint's"
            )
        return ours

    @cached_property
    def objective(self) -> Objective:
        return registry.build(**self.objective_settings)

    @cached_property
    def found(self) -> Found:
        """The finished runs at the places of `task.runs`; where it names none, below `paths.runs`."""
        places = self.config["task"]["runs"]
        if not places:
            return found([self.cfg.paths.runs]) if Path(self.cfg.paths.runs).is_dir() else Found()
        return found([places] if isinstance(places, str) else places)

    @property
    def planned_network(self) -> GPTConfig:
        """The network, of settings alone: no image is read and nothing is fitted to any.

        Of a tokenizer that is fitted, V is an upper bound.
        """
        if self.weights is not None and self._from_weights("model"):
            return self.weights.metadata.network
        if self.weights is not None and self._from_weights("tokens"):
            return self.network
        n_ctx, n_vocab = self.tokenizer_settings.sizes(self.cfg.data.resolution)
        return self._network(n_ctx=n_ctx, n_vocab=n_vocab)

    @cached_property
    def network(self) -> GPTConfig:
        """The network: the run's own, or that of its weights."""
        n_ctx, n_vocab = self.tokenizer.grid.n_ctx, self.tokenizer.n_vocab
        if self.weights is not None and self._from_weights("model"):
            theirs = self.weights.metadata.network
            return replace(theirs, n_ctx=n_ctx, n_vocab=n_vocab, causal=self.objective.causal)
        return self._network(n_ctx=n_ctx, n_vocab=n_vocab)

    def _network(self, *, n_ctx: int, n_vocab: int) -> GPTConfig:
        """The network of `conf/model/`, with what it is given by tokens and objective."""
        spec = {key: value for key, value in self.config["model"].items() if key != "name"}
        network: GPTConfig = factory(spec, "model")(n_ctx=n_ctx, n_vocab=n_vocab, causal=self.objective.causal)
        return network

    def check_weights(self) -> None:
        """Raises ValueError where the run chooses another network, palette or objective than its weights have."""
        if self.weights is None:
            return
        metadata, folder = self.weights.metadata, self.weights.folder
        if not self._from_weights("model"):
            theirs = metadata.network
            ours = self._network(n_ctx=theirs.n_ctx, n_vocab=theirs.n_vocab)
            native.check_same("network", theirs.to_dict(), {**ours.to_dict(), "causal": theirs.causal}, folder)
        if not self._from_weights("objective"):
            native.check_same("objective", metadata.objective, self.objective_settings, folder)
        if self._from_weights("tokens"):
            stated = [key for key, value in self.config["tokens"].items() if value is not None]
            if stated:
                raise ValueError(f"tokens=checkpoint takes the checkpoint's {' and '.join(stated)}: state no other")
        if not self._from_weights("tokens") or "tokens" in self.cfg.task.needs:
            assert self.tokenizer  # which compares itself with that of the weights
        if "tokens" in self.cfg.task.needs:
            inputs.compare_splits(self.config["data"], folder.parent)

    def _from_weights(self, group: str) -> bool:
        return bool(self.choices[group] == CHECKPOINT)

    # What a task lists under `needs`, each given the run folder.

    def need_runner(self, folder: RunFolder) -> Runner:
        watching = (self.config.get("callbacks") or {}) if self.trains else {}
        callbacks = [factory(spec, f"callbacks.{key}")() for key, spec in watching.items()]
        if self.machine.device.type == "cpu":
            hold_memory()
        runner = Runner(machine=self.machine, folder=folder.path, callbacks=callbacks)
        if self.trains:
            runner.loggers.extend(self.loggers(folder, step_of(runner.resume_from) if runner.resume_from else 0))
        return runner

    @property
    def trains(self) -> bool:
        """Whether there are optimiser steps to watch."""
        return "net" in self.cfg.task.needs or self.cfg.task.get("solver") == "sgd"

    def loggers(self, folder: RunFolder, first_step: int = 0) -> list[Logger]:
        """Those the run chooses, begun; a pipeline has none of its own, its stages have."""
        if not self.machine.rank.first or "stage" in self.cfg.task.needs:
            return []
        about = About(
            task=self.task,
            model=self.model_name,
            data=self.data_name,
            objective=self.objective_settings["name"],
            run_id=f"{self.name}-{folder.read_run()['id']}",
            first_step=first_step,
            trains=self.trains,
            pipeline=folder.path.parent.name if (folder.path.parent / "run.json").is_file() else None,
        )
        chosen = self.config.get("logger") or {}
        begun = [factory(spec, f"logger.{key}")(folder.path, about) for key, spec in chosen.items()]
        kept = [logger for logger in begun if logger is not None]
        for logger in kept:
            logger.log_hyperparams(self.config)
        return kept

    def need_machine(self, folder: RunFolder) -> Machine:
        return self.machine

    def need_crop(self, folder: RunFolder) -> Crop:
        return evaluation_crop(self.config["data"])

    def need_tokens(self, folder: RunFolder) -> Callable[..., TokenDataModule]:
        return partial(
            TokenDataModule,
            source=self.source,
            tokenizer=self.tokenizer,
            seed=self.cfg.seed,
            num_workers=self.machine.readers,
            cache=Path(self.cfg.paths.cache),
        )

    def need_net(self, folder: RunFolder) -> "partial[GPT]":
        return partial(GPT, self.network)

    def need_cache(self, folder: RunFolder) -> Path:
        return Path(self.cfg.paths.cache)

    def need_found(self, folder: RunFolder) -> Found:
        return self.found

    def need_made_by(self, folder: RunFolder) -> dict[str, Any]:
        """What decides the features of an image beside the weights: names their file."""
        not_of_features = ("n_colour", "augment", "shift", "shift_share")
        data = {key: value for key, value in self.config["data"].items() if key not in not_of_features}
        return {
            "data": data,
            "images": {
                key: sha for key, sha in self.files_sha256.items() if key.endswith(".path") and key != "tokens.path"
            },
            "precision": self.machine.precision,
            "objective": self.objective_settings,
            "seed": self.cfg.seed,
        }

    def need_objective(self, folder: RunFolder) -> Objective:
        return self.objective

    def need_weights(self, folder: RunFolder) -> Weights | None:
        return self.weights

    def need_seed(self, folder: RunFolder) -> int:
        return int(self.cfg.seed)

    def need_folder(self, folder: RunFolder) -> Path:
        return folder.path

    def need_init(self, folder: RunFolder) -> str | None:
        init: str | None = self.cfg.init
        return init

    def need_metadata(self, folder: RunFolder) -> Callable[..., CheckpointMetadata]:
        """What the weights this run will make are to say of themselves, but for their step."""
        return partial(
            CheckpointMetadata,
            network=self.network,
            tokenizer=self.tokenizer,
            objective=self.objective_settings,
            model=self.model_name,
            data=self.data_name,
            seed=self.cfg.seed,
        )
