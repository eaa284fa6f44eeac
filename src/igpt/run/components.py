"""The parts of a run (data, tokenizer, network, Trainer …), each built from the config at its first use."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger

from igpt.checkpoint import igpt_format
from igpt.checkpoint.classifier import Classifier, find_class_head
from igpt.checkpoint.igpt_format import CheckpointMetadata, Weights
from igpt.checkpoint.resume import parse_step
from igpt.data.crop import Crop, evaluation_crop
from igpt.data.limited import LimitedSource
from igpt.data.order import BatchPlan
from igpt.data.source import Source
from igpt.distributed import ranks
from igpt.metric.result import Result
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.objective import registry
from igpt.objective.base import Objective
from igpt.report.paper import check_paper_key
from igpt.run.entries import build_callbacks, describe_run, list_builders
from igpt.run.fingerprint import compare_splits, compare_tokenizer_images
from igpt.run.run_config import RunConfig
from igpt.run.targets import checked_partial, task_settings, without
from igpt.settings.fields import parse_settings
from igpt.settings.training import PretrainSettings
from igpt.tokens.datamodule import ONE_BY_ONE, PixelDataModule, TokenDataModule
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer import TokenGrid, Tokenizer, TokenizerSettings
from igpt.tokens.vqvae_tokenizer import UNTRAINED, VQVAESettings, check_trainable
from igpt.training.hardware import HardwareConfig, disable_malloc_trim
from igpt.training.trainer import Runner


class Components:
    """The parts of one run, built lazily and passed to its task.

    n_ctx and n_vocab come from the tokenizer, `causal` from the objective. `model=checkpoint`, `tokens=checkpoint` and
    `objective=checkpoint` take that part from the weights of `init=`; any other choice must agree with them.
    """

    run_dir: Path  # set by `launch`; unset for `trainer.plan=true`
    run_stage: Callable[..., tuple[Result, Path]]  # arguments: `stage_runner`; set for a pipeline only

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.seed, self.cache_dir, self.weights = run.seed, run.cache_dir, run.weights
        self.init: str | None = run.cfg.init
        self.loggers: list[Logger] = []  # those that were started

    def check_settings(self) -> None:
        """Raises ValueError, with the setting's name, for an invalid setting; builds nothing."""
        task = self.run.config["task"]
        check_paper_key(task, "task")
        settings = task_settings(task["_target_"], task)
        if isinstance(settings, PretrainSettings) and self.hardware.is_sharded:
            settings.check_sharded(self.hardware.strategy)
        if self.hardware.lightning.gradient_clip_algorithm and task.get("gradient_clip", 0) is None:
            raise ValueError("trainer.lightning.gradient_clip_algorithm clips by task.gradient_clip, which is null")
        self.check_parts()

    def check_parts(self) -> None:
        """As `check_settings`, without the settings of the task."""
        list_builders(self.run.config, "callbacks")
        list_builders(self.run.config, "logger")
        if self.run.requires & {"images", "tokens", "tokenizer", "stages"}:
            self._source_partial()
        if "tokens" in self.run.requires and not self.run.takes_from_weights("tokens"):
            self.hardware.check_network(self.planned_network)
        elif self.weights is not None:
            self.hardware.check_network(self.weights.metadata.network)
        if "tokenizer" in self.run.requires:
            _ = self.vqvae_settings

    def check_tokenizer(self) -> None:
        """Raises ValueError if images are to be read as tokens of a trained tokenizer, and none is named.

        Logs where the run that trained it held out other images, or was of another dataset.
        """
        run = self.run
        if "tokens" not in run.requires or not run.reads_saved_tokenizer:
            return
        if run.saved_tokenizer is None:
            raise ValueError(UNTRAINED)
        compare_tokenizer_images(run.config["data"], run.config["tokens"]["path"])

    def _source_partial(self) -> Callable[..., Source]:
        return checked_partial(without(self.run.config["data"], "palette_size"), "data")

    @property
    def trained_weights(self) -> Weights:
        """The weights of `init=`, for a task that requires them."""
        assert self.weights is not None, "RunConfig has seen to it"
        return self.weights

    @cached_property
    def classifier(self) -> Classifier:
        """The trained head of the weights, or that of `task.head`. Raises ValueError without one that fits them."""
        return find_class_head(self.trained_weights, self.run.config["task"]["head"])

    @cached_property
    def hardware(self) -> HardwareConfig:
        return parse_settings(HardwareConfig, without(self.run.config["trainer"], "_target_"), "trainer")

    @cached_property
    def runner(self) -> Runner:
        """The Trainer calls; with the run's callbacks and loggers, if it trains."""
        callbacks = build_callbacks(self.run.config) if self.run.trains else []
        if self.hardware.device.type == "cpu":
            disable_malloc_trim()
        runner = Runner(machine=self.hardware, folder=self.run_dir, callbacks=callbacks)
        if self.run.trains:
            runner.loggers.extend(self.build_loggers(parse_step(runner.resume_from) if runner.resume_from else 0))
        return runner

    def build_loggers(self, first_step: int = 0) -> list[Logger]:
        """The started loggers of the config group `logger`; none on ranks > 0 or for a pipeline, whose stages log.

        `first_step`: the optimiser step this process resumes from.
        """
        if not self.hardware.rank.is_first or "stages" in self.run.requires:
            return []
        about = describe_run(self.run, self.run_dir, first_step=first_step)
        for build in list_builders(self.run.config, "logger"):
            if (logger := build(self.run_dir, about, self.run.config)) is not None:
                self.loggers.append(logger)
        return self.loggers

    @cached_property
    def source(self) -> Source:
        """The images; of splits that `trainer.lightning` limits, a part."""
        arguments, batch_size = self.hardware.lightning, self.run.batch_size
        if not arguments.limits or not isinstance(batch_size, int):
            return self._full_source
        return LimitedSource(
            self._full_source, arguments.limits, batch_size=batch_size, augment=arguments.overfit_batches is None
        )

    @cached_property
    def _full_source(self) -> Source:
        return self._source_partial()(cache=self.cache_dir, list_files=self.run.list_files)

    @cached_property
    def evaluation_crop(self) -> Crop:
        """The crop of an image for evaluation."""
        return evaluation_crop(self.run.config["data"])

    @cached_property
    def tokenizer_settings(self) -> TokenizerSettings:
        settings: TokenizerSettings = checked_partial(self.run.config["tokens"], "tokens")()
        return settings

    @cached_property
    def vqvae_settings(self) -> VQVAESettings:
        """The settings of the tokenizer that this run trains.

        Raises:
            ValueError: it is not one to train, is trained already, or does not fit the images.
        """
        settings = None if self.run.takes_from_weights("tokens") else self.tokenizer_settings
        option, resolution = self.run.choices["tokens"], self.run.cfg.data.resolution
        return check_trainable(settings, task=self.run.task, option=option, resolution=resolution)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the config or of the weights.

        Raises:
            ValueError: weights of another tokenizer or resolution.
        """
        saved = self.weights.tokenizer if self.weights is not None else None
        data = self.run.cfg.data
        if self.weights is not None and saved is not None and saved.side != data.resolution:
            resizes = "resize_positions" in self.run.config["task"]
            raise ValueError(
                f"{self.weights.folder} reads {saved.side}×{saved.side} pixels ({self.weights.metadata.data}), "
                f"data={data.name} gives {data.resolution}×{data.resolution}"
                + (": task.resize_positions=true interpolates its positions" if resizes else "")
            )
        if self.run.takes_from_weights("tokens"):
            assert saved is not None, "RunConfig has seen to it"
            return saved
        tokenizer = self.run.saved_tokenizer or ranks.broadcast_from_rank0(  # machines may round k-means differently
            lambda: self.tokenizer_settings.build(self._full_source, self.cache_dir)
        )
        if self.weights is not None and saved is not None and tokenizer.hash != saved.hash:
            raise ValueError(
                f"{self.weights.folder} was trained on other tokens ({saved.describe()}, {saved.hash}) than "
                f"this run's ({tokenizer.describe()}, {tokenizer.hash}): tokens=checkpoint takes the checkpoint's"
            )
        return tokenizer

    def build_datamodule(
        self, *, plan: BatchPlan = ONE_BY_ONE, eval_split: str = "val", with_val: bool = False, augment: bool = True
    ) -> TokenDataModule:
        """The DataModule of token batches. `plan`: the distribution of a step's images over ranks and micro batches."""
        return TokenDataModule(
            source=self.source, tokenizer=self.tokenizer, seed=self.seed, num_workers=self.hardware.n_reader,
            cache=self.cache_dir, plan=plan, eval_split=eval_split, with_val=with_val, augment=augment,
        )  # fmt: skip

    def build_pixel_datamodule(self, *, plan: BatchPlan) -> PixelDataModule:
        """The DataModule of pixels, for a run that trains a tokenizer."""
        return PixelDataModule(source=self.source, seed=self.seed, num_workers=self.hardware.n_reader, plan=plan)

    @cached_property
    def objective(self) -> Objective:
        """L_GEN, the pretraining loss."""
        return registry.build_objective(**self.run.objective_settings)

    @cached_property
    def network(self) -> GPTConfig:
        """The network's config: of the group `model`, or of the weights (`model=checkpoint`)."""
        grid, order, n_vocab = self.tokenizer.grid, self.tokenizer.order, self.tokenizer.n_vocab
        if self.weights is not None and self.run.takes_from_weights("model"):
            return replace(self.weights.metadata.network, **self._sizes(grid, order, n_vocab))
        return self._network(grid, order, n_vocab)

    @property
    def planned_network(self) -> GPTConfig:
        """The network's config from the settings alone: reads no image and fits no tokenizer.

        n_vocab is an upper bound where the tokenizer has to be fitted.
        """
        weights, takes = self.weights, self.run.takes_from_weights
        if weights is not None and (takes("model") or takes("tokens")):
            return weights.metadata.network if takes("model") else self.network
        settings, saved = self.tokenizer_settings, self.run.saved_tokenizer
        grid, n_vocab = settings.sizes(self.run.cfg.data.resolution)
        order = PixelOrder.from_name(grid.rows, settings.order) if saved is None else saved.order
        return self._network(grid, order, n_vocab)

    def _network(self, grid: TokenGrid, order: PixelOrder, n_vocab: int) -> GPTConfig:
        """The network's config of `conf/model/`, for these tokens and the objective."""
        settings, sizes = self.run.config["model"], self._sizes(grid, order, n_vocab)
        if given := next((name for name in sizes if name in settings), None):
            raise ValueError(f"model.{given} comes from the tokens and the objective: leave it out")
        network: GPTConfig = checked_partial(without(settings, "name"), "model")(**sizes)
        return network

    def _sizes(self, grid: TokenGrid, order: PixelOrder, n_vocab: int) -> dict[str, Any]:
        """The settings of a network that come from its tokens and its objective."""
        return {
            "n_ctx": grid.n_ctx, "n_vocab": n_vocab, "causal": self.objective.causal, "grid": tuple(grid),
            "permutation": None if order.is_raster else order.permutation,
        }  # fmt: skip

    def build_network(self) -> GPT:
        """The network, its weights not yet initialised."""
        return GPT(self.network)

    def checkpoint_metadata(self, *, step: int) -> CheckpointMetadata:
        """The metadata saved with this run's weights."""
        return CheckpointMetadata(
            network=self.network,
            tokenizer=self.tokenizer,
            objective=self.run.objective_settings,
            model=self.run.model_name,
            data=self.run.data_name,
            seed=self.seed,
            step=step,
        )

    @cached_property
    def cache_key(self) -> dict[str, Any]:
        """Everything but the weights that determines the features of an image; part of their cache key."""
        return {
            **self.run.image_key,
            "tokenizer": self.tokenizer.hash,
            "precision": self.hardware.precision,
            "objective": self.run.objective_settings,
            "seed": self.seed,
        }

    def check_weights(self) -> None:
        """Raises ValueError where the config's network, tokenizer or objective differs from that of the weights."""
        if self.weights is None:
            return
        metadata, folder, takes = self.weights.metadata, self.weights.folder, self.run.takes_from_weights
        if not takes("model"):
            saved = metadata.network
            tokenizer = metadata.tokenizer
            network = self._network(tokenizer.grid, tokenizer.order, tokenizer.n_vocab)
            igpt_format.check_equal("network", asdict(saved), {**asdict(network), "causal": saved.causal}, folder)
        if not takes("objective"):
            igpt_format.check_equal("objective", metadata.objective, self.run.objective_settings, folder)
        if takes("tokens"):
            stated = [key for key, value in self.run.config["tokens"].items() if value is not None]
            if stated:
                raise ValueError(f"tokens=checkpoint takes the checkpoint's {' and '.join(stated)}: state no other")
        if not takes("tokens") or "tokens" in self.run.requires:
            assert self.tokenizer  # the property compares its hash with that of the weights
        if "tokens" in self.run.requires:
            compare_splits(self.run.config["data"], folder.parent)
