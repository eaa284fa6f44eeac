"""A run's config with everything derived from it: requirements, name, initial weights, input hashes."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import hydra
import PIL
from omegaconf import DictConfig, OmegaConf

from igpt.checkpoint.classifier import find_class_head
from igpt.checkpoint.find import find_vqvae, find_weights
from igpt.checkpoint.igpt_format import Weights
from igpt.checkpoint.kept import list_paths
from igpt.checkpoint.resized import resize_weights
from igpt.data.listing import list_files
from igpt.report.found_runs import FoundRuns, find_runs, read_runs
from igpt.report.identity import format_run_name, identity
from igpt.run import fingerprint
from igpt.run.early_checks import check_strategy
from igpt.run.recipes import CHECKPOINT
from igpt.run.targets import checked_partial, find_target
from igpt.settings.data import name_images
from igpt.settings.fields import parse_settings
from igpt.settings.lightning_arguments import deciding_arguments
from igpt.settings.probing import name_encoder
from igpt.settings.run import RunSettings, check_structure
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.vqvae_tokenizer import VQVAESettings, VQVAETokenizer
from igpt.training.loggers import trains
from igpt.training.precision import resolve_precision

log = logging.getLogger(__name__)

NOT_OF_FEATURES = ("palette_size", "augment", "shift", "shift_share")  # settings of the data


def to_dict(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """The config as nested dicts and lists; interpolations are resolved, or left as text."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=resolve))


def resolve_config(cfg: DictConfig) -> dict[str, Any]:
    """As `to_dict`, and `trainer.precision=auto` is what it means on this machine."""
    config = to_dict(cfg)
    return {**config, "trainer": {**config["trainer"], "precision": resolve_precision(config["trainer"])}}


class RunConfig:
    """A composed config with the chosen option of each group, and the arguments that named further config folders.

    Raises:
        ValueError: two strategies, weights that are required and missing, or a trained tokenizer of other settings or
            images.
    """

    def __init__(self, cfg: DictConfig, choices: dict[str, Any], search_path: Sequence[str] = ()) -> None:
        self.cfg, self.choices, self.search_path = cfg, choices, list(search_path)
        check_structure(to_dict(cfg, resolve=False))
        if cfg.resume in (None, "auto"):  # a run that was begun with two goes on as it began
            check_strategy(choices.get("trainer"), cfg.trainer.get("strategy"))
        self.list_files = cache(list_files)  # one listing per run, for its name and its images
        self.task: str = cfg.task.name
        self.requires = frozenset(cfg.task.requires)
        self.saved_tokenizer = self._find_tokenizer()  # of `tokens.path`; its settings are now those of `cfg`
        settings = parse_settings(RunSettings, {name: self.config[name] for name in RunSettings.model_fields}, "")
        self.seed, self.cache_dir = settings.seed, Path(settings.paths.cache)
        self.weights = self._find_weights()

    @property
    def reads_saved_tokenizer(self) -> bool:
        """Whether the images become the tokens of a VQ-VAE that was trained before, and is not in the weights."""
        target = self.cfg.tokens.get("_target_")
        if target is None or "tokenizer" in self.requires:
            return False
        return find_target(target, "tokens") is VQVAESettings

    def _find_tokenizer(self) -> VQVAETokenizer | None:
        """The VQ-VAE of `tokens.path`; replaces the settings in `tokens` by its own.

        Raises:
            ValueError: an invalid setting or one that is neither the VQ-VAE's nor the default; images of another
                resolution.
        """
        tokens, data = self.cfg.tokens, self.cfg.data
        if tokens.get("path") is None or not self.reads_saved_tokenizer:
            return None
        checked_partial(to_dict(tokens), "tokens")()  # not `self.config`, which stays as it is first read
        tokenizer = find_vqvae(tokens.path)
        if self.requires & {"tokens", "stages"} and tokenizer.side != data.resolution:
            raise ValueError(
                f"tokens.path={tokens.path}: a VQ-VAE of {tokenizer.side}×{tokenizer.side} pixels, data={data.name} "
                f"gives {data.resolution}×{data.resolution}: train one of these images, task=tokenizer"
            )
        default = hydra.compose(f"tokens/{self.choices['tokens']}").tokens
        saved = {**tokenizer.config.model_dump(), "order": _name_order(tokenizer.order, tokens.order)}
        for key, value in saved.items():
            if tokens[key] not in (value, default[key]):
                raise ValueError(
                    f"tokens.{key}={tokens[key]}, and the VQ-VAE in tokens.path={tokens.path} has {value}: leave it "
                    "out, or train another one, task=tokenizer"
                )
            tokens[key] = value
        return tokenizer

    def _find_weights(self) -> Weights | None:
        cfg = self.cfg
        if "tokenizer" in self.requires:
            if cfg.init is not None:
                raise ValueError(f"task={self.task} begins with weights that are drawn: leave init={cfg.init} out")
            return None
        if "images" in self.requires and cfg.init is not None:
            raise ValueError(f"task={self.task} reads no weights of ours, task.encoder does: leave init={cfg.init} out")
        reads_runs = "runs" in cfg.task and "finished_runs" not in self.requires  # the weights, not the numbers
        if reads_runs and not cfg.task.runs and "weights" not in self.requires:
            raise ValueError(f"task={self.task} compares runs: task.runs=[RUN_FOLDER,RUN_FOLDER], of pretraining")
        if reads_runs and not (OmegaConf.is_list(cfg.task.runs) and all(isinstance(run, str) for run in cfg.task.runs)):
            raise ValueError(f"task.runs must be a list of run folders, got {cfg.task.runs}")
        if reads_runs and cfg.task.runs and cfg.init is not None and "weights" in self.requires:
            raise ValueError(f"task={self.task}: init={cfg.init} and task.runs={list(cfg.task.runs)}: give one of them")
        is_first = reads_runs and cfg.task.runs and cfg.init is None
        start = list_paths(cfg.task.runs[0])[-1] if is_first else cfg.init
        if start is not None:
            settings = cfg.task.get("stages", {}).get("import") or cfg.task  # not stored in OpenAI's checkpoints
            palette = settings.get("palette") or cfg.data.get("clusters")
            weights = find_weights(start, palette=palette, n_head=settings.get("n_head"))
            if weights.probe is not None:
                log.info("init=%s is a probe: the weights that it probed are taken, %s", start, weights.path)
            side, resizes = cfg.data.get("resolution"), cfg.task.get("resize_positions") is True
            return resize_weights(weights, side) if resizes and type(side) is int and 0 < side <= 4096 else weights
        from_weights = [group for group in ("model", "tokens", "objective") if self.takes_from_weights(group)]
        if from_weights and self.requires & {"weights", "network"}:
            of_import = "OpenAI's or Hugging Face's, or a checkpoint"
            which = of_import if self.task == "import" else "of a finished pretraining run"
            raise ValueError(f"task={self.task} needs trained weights: init=PATH ({which})")
        return None

    def takes_from_weights(self, group: str) -> bool:
        """Whether `model`, `tokens` or `objective` comes from the weights of `init=`."""
        return bool(self.choices.get(group) == CHECKPOINT)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole config, resolved; so is `trainer.precision=auto`, for this machine."""
        return resolve_config(self.cfg)

    @property
    def recorded_config(self) -> dict[str, Any]:
        """The config to record: `trainer.precision` as it was set, `auto`, too."""
        trainer = {**self.config["trainer"], "precision": self.cfg.trainer.get("precision")}
        return {**self.config, "trainer": trainer}

    @property
    def computes(self) -> bool:
        """Whether the task computes with a network."""
        return "finished_runs" not in self.requires

    @property
    def trains(self) -> bool:
        """Whether the task takes optimiser steps (for callbacks and loggers)."""
        return trains(self.config["task"])

    @property
    def model_name(self) -> str:
        if "tokenizer" in self.requires:
            return str(self.choices["tokens"]).rpartition("/")[2]
        if "images" in self.requires:
            return name_encoder(str(self.cfg.task.encoder))
        if self.weights is not None and self.takes_from_weights("model"):
            return self.weights.metadata.model
        return str(self.cfg.model.name)

    @property
    def data_name(self) -> str:
        """The images of the run; of a task that reads none, those its weights were trained on."""
        if self.weights is not None and not self.requires & {"tokens", "stages"}:
            return self.weights.metadata.data
        return name_images(self.config["data"])

    @property
    def objective_settings(self) -> dict[str, Any]:
        """The objective's name and numbers, of the config or of the weights (`objective=checkpoint`).

        Of a run that trains a tokenizer: the name of its reconstruction loss; of one without a network of ours: none.
        """
        if "tokenizer" in self.requires:
            return {"name": str(self.config["tokens"].get("loss"))}
        if "images" in self.requires:
            return {"name": "none"}
        if self.weights is not None and self.takes_from_weights("objective"):
            return self.weights.metadata.objective
        settings: dict[str, Any] = self.config["objective"]
        return settings

    @property
    def subject(self) -> dict[str, str]:
        """The names of model, data and objective, and the chosen options of `data` and, if there is one, `variant`."""
        objective = self.objective_settings["name"]
        names = {"model": self.model_name, "data": self.data_name, "objective": objective}
        variant = {"variant": chosen} if (chosen := self.choices.get("variant")) else {}
        return {**names, "data_option": self.choices["data"], **variant}

    @property
    def name(self) -> str:
        """The run directory's name: task, model, data, objective, seed, and 8 hex digits of the config's hash."""
        return self.format_name(self.subject)

    @property
    def older_names(self) -> list[str]:
        """The names of this run in older releases: `cifar108`, `folder8`, a pipeline's by its initial weights' data."""
        older = [f"{self.cfg.data.name}{self.cfg.data.resolution}"]
        older += [] if self.weights is None else [self.weights.metadata.data]
        return [self.format_name({**self.subject, "data": data}) for data in older]

    def format_name(self, subject: Mapping[str, str]) -> str:
        """The run directory's name with these names of model, data and objective."""
        return format_run_name(self.config["task"], subject, self.seed, identity(self.config, self.input_hashes))

    @cached_property
    def input_hashes(self) -> dict[str, str | None]:
        """SHA-256 of the input files: initial weights, palettes, images (of their names and sizes)."""
        compared = self.finished_runs.input_hashes if "finished_runs" in self.requires else None
        init = self.weights.sha256 if self.weights is not None else None
        hashes = fingerprint.input_hashes(self.config, init=init, runs=compared, list_files=self.list_files)
        if "head" in self.config["task"] and self.weights is not None and self.config["task"].get("run_folder", True):
            hashes["task.head"] = find_class_head(self.weights, self.config["task"]["head"]).sha256
        return hashes | ({} if self.saved_tokenizer is None else {"tokens.path": self.saved_tokenizer.hash})

    @property
    def batch_size(self) -> Any:
        """Images of a step or of a pass, of which `trainer.lightning` limits a number; None: no batches are read."""
        task = self.config["task"]
        return (task["sgd"] if task.get("solver") == "sgd" else task).get("batch_size")

    @property
    def image_key(self) -> dict[str, Any]:
        """Everything that determines the images of the splits; part of the cache key of their features."""
        limits = deciding_arguments(self.config["trainer"])
        return {
            "data": {key: value for key, value in self.config["data"].items() if key not in NOT_OF_FEATURES},
            **({"limits": {**limits, "batch_size": self.batch_size}} if limits else {}),
            "images": {k: sha for k, sha in self.input_hashes.items() if k.endswith(".path") and k != "tokens.path"},
            "pillow": PIL.__version__,  # decodes, resizes and draws them
        }

    @cached_property
    def finished_runs(self) -> FoundRuns:
        """The finished runs of `task.runs`, of `paths.runs` where that is empty; of `task.study` the run itself."""
        if "study" in (task := self.config["task"]):
            return FoundRuns() if task["study"] is None else read_runs([Path(task["study"])])
        places = task["runs"]
        if not places:
            return find_runs([self.cfg.paths.runs]) if Path(self.cfg.paths.runs).is_dir() else FoundRuns()
        return find_runs([places] if isinstance(places, str) else places)


def _name_order(order: PixelOrder, stated: str) -> str:
    """`raster`; of another order `stated` if that is its name, else `other`: the name is not saved."""
    is_named = stated.startswith("random") and PixelOrder.from_name(order.side, stated).permutation == order.permutation
    return "raster" if order.is_raster else stated if is_named else "other"
