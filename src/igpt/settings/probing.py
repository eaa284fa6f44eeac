"""Settings of the tasks that use a network's features."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from igpt.settings.fields import (
    Count,
    Decay,
    FeatureDtype,
    Layer,
    Norm,
    Pooling,
    Positive,
    Seed,
    Settings,
    Split,
    WholeNumber,
    check_layer,
)
from igpt.settings.training import TrainingSettings

Pixel = Annotated[list[WholeNumber], Field(min_length=2, max_length=2)]  # row, column
PIXELS, RAW_PIXELS = "pixels", "raw_pixels"  # of task.baselines; in the names of results
CGrid = Annotated[list[Positive], Field(min_length=1)]  # scikit-learn's C


def _check_odd(n: int) -> int:
    if n % 2 == 0:
        raise ValueError(f"task.concat_layers is null or an odd number of layers from 3 on, got {n}")
    return n


class SGDProbeSettings(TrainingSettings):
    """`task.sgd`: heads trained by SGD with momentum. Source: Chen et al. 2020, §3.2."""

    rates: Annotated[list[Positive], Field(min_length=1)]
    momentum: Decay
    gradient_clip: Positive | None  # largest norm of a head's gradient
    val_every: Count  # optimiser steps
    search: Literal["together", "in_turn"]
    augment: bool


class PooledSettings(Settings):
    """Pooled features of a network."""

    norm: Norm
    dtype: FeatureDtype
    batch_size: Count  # images per forward pass


class FeatureSettings(PooledSettings):
    """Features and the C values of their probes."""

    C_grid: CGrid


class ProbeSettings(FeatureSettings):
    """`task=probe`. Protocol: Chen et al. 2020, §3.2."""

    solver: Literal["lbfgs", "sgd"]
    sgd: SGDProbeSettings
    layer: Layer
    concat_layers: Annotated[int, Field(ge=3), AfterValidator(_check_odd)] | None
    eval_masks: Count
    folds: Annotated[int, Field(ge=2)] | Literal["auto"] | None
    refit: bool | Literal["auto"]
    resize_positions: bool
    test: bool
    baselines: list[Literal["untrained", "pixels"]]

    @model_validator(mode="after")
    def _check_solver(self) -> "ProbeSettings":
        if self.solver == "sgd" and isinstance(self.folds, int):
            raise ValueError("task.solver=sgd judges on val: set task.folds=null")
        if self.solver == "sgd" and self.concat_layers is not None and self.layer is None:
            raise ValueError(
                "task.solver=sgd with task.concat_layers needs to know around which layer: task.layer=N, the best one"
            )
        return self


def name_encoder(spec: str) -> str:
    """The name of an encoder for tables and files: `resnet-18` of `microsoft/resnet-18` or `/folder/resnet-18`."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(spec).name.removesuffix(".npy").removesuffix(".safetensors"))
    return name.strip("._-")[:40] or "encoder"


class EncoderProbeSettings(Settings):
    """`task=probe_encoder`. Protocol: as of `task=probe` with L-BFGS."""

    encoder: Annotated[str, Field(min_length=1)]
    input_size: Annotated[int, Field(ge=1, le=4096)] | None  # pixels a side
    pooling: Pooling
    dtype: FeatureDtype
    batch_size: Count  # images per forward pass
    C_grid: CGrid
    folds: Annotated[int, Field(ge=2)] | Literal["auto"] | None
    refit: bool
    test: bool
    baselines: list[Literal["pixels"]]


def _check_baselines(baselines: list[str]) -> list[str]:
    compared = [RAW_PIXELS if spec == PIXELS else name_encoder(spec) for spec in baselines]
    names = ["accuracy", *compared, *(f"gain_over_{name}" for name in compared)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"task.baselines must be pixels and encoders of different names, got {twice[0]} twice: rename its folder"
        )
    return baselines


class LowDataSettings(FeatureSettings):
    """`task=low_data`. Protocol: Chen et al. 2020, Table 4."""

    per_class: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]  # labels of each class
    subsets: Annotated[int, Field(ge=2)]  # at least two, for a standard deviation
    subset_seed: Seed
    layer: Layer
    eval_masks: Count
    baselines: Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(_check_baselines)]
    split: Split

    @property
    def encoders(self) -> dict[str, str]:
        """Name in the results → `task.encoder` of it, of the baselines that are encoders."""
        return {name_encoder(spec): spec for spec in self.baselines if spec != PIXELS}


class ScalingSettings(FeatureSettings):
    """`task=scaling`. Source: Chen et al. 2020, Figure 3."""

    runs: list[str]
    probe_data: dict[str, Any] | None  # as the group `data`; None: the images of the loss
    split: Split  # of the loss
    eval_masks: Count


class InspectSettings(PooledSettings):
    """`task=inspect`."""

    split: Split  # of the images shown and judged
    count: Count  # images shown
    eval_masks: Count
    attention_images: WholeNumber
    queries: Count | Annotated[list[Pixel], Field(min_length=1)]  # their number, or the pixels themselves
    attention_layers: Annotated[list[Count], Field(min_length=1)] | None
    attention_heads: Annotated[list[Count], Field(min_length=1)] | None
    train_images: Count
    val_images: Count
    layer: Layer
    k: Count
    neighbours: WholeNumber


def _check_layers(layers: Any) -> Any:
    if layers == "all":
        return layers
    try:
        each = [check_layer(layer) for layer in (layers if isinstance(layers, list) else [layers])]
    except ValueError as error:
        raise ValueError(f"{error}".replace("task.layer must", "task.layers: each must")) from error
    if not each or None in each:
        raise ValueError("task.layers must be all, a layer or a list of layers, got none")
    return layers


class ExportFeaturesSettings(PooledSettings):
    """`task=features`."""

    splits: Annotated[list[Split], Field(min_length=1)]
    layers: Annotated[Any, AfterValidator(_check_layers)]
    format: Literal["safetensors", "npy"]
