"""Settings of the tasks that use a network's features."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from igpt.settings.fields import (
    Count,
    Decay,
    FeatureDtype,
    Norm,
    Positive,
    Seed,
    Settings,
    Split,
    WeightDecay,
    WholeNumber,
)
from igpt.settings.training import TrainingSettings

Strengths = Annotated[list[Positive], Field(min_length=1)]  # scikit-learn's C


def _check_odd(n: int) -> int:
    if n % 2 == 0:
        raise ValueError(f"task.concat is null or an odd number of layers from 3 on, got {n}")
    return n


class SGDProbeSettings(TrainingSettings):
    """`task.sgd`: heads trained by SGD with momentum. Source: Chen et al. 2020, §3.2."""

    rates: Annotated[list[Positive], Field(min_length=1)]
    momentum: Decay
    weight_decay: WeightDecay
    val_every: Count  # optimiser steps


class FeatureSettings(Settings):
    """Features and the C values of their probes."""

    norm: Norm
    dtype: FeatureDtype
    batch_size: Count  # images per forward pass
    strengths: Strengths


class ProbeSettings(FeatureSettings):
    """`task=probe`. Protocol: Chen et al. 2020, §3.2."""

    solver: Literal["lbfgs", "sgd"]
    sgd: SGDProbeSettings
    layer: WholeNumber | None
    concat: Annotated[int, Field(ge=3), AfterValidator(_check_odd)] | None
    masks: Count
    folds: Annotated[int, Field(ge=2)] | Literal["auto"] | None
    refit: bool
    test: bool
    untrained: bool
    pixels: bool

    @model_validator(mode="after")
    def _check_solver(self) -> "ProbeSettings":
        if self.solver == "sgd" and isinstance(self.folds, int):
            raise ValueError("task.solver=sgd judges on val: set task.folds=null")
        if self.solver == "sgd" and self.concat is not None and self.layer is None:
            raise ValueError(
                "task.solver=sgd with task.concat needs to know around which layer: task.layer=N, the best one"
            )
        return self


class LowDataSettings(FeatureSettings):
    """`task=low_data`. Protocol: Chen et al. 2020, Table 4."""

    per_class: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]  # labels of each class
    subsets: Annotated[int, Field(ge=2)]  # at least two, for a standard deviation
    subset_seed: Seed
    layer: WholeNumber | None
    masks: Count
    pixels: bool
    split: Split


class ScalingSettings(FeatureSettings):
    """`task=scaling`. Source: Chen et al. 2020, Figure 3."""

    runs: list[str]
