"""Settings of the tasks that neither train nor sample."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from igpt.settings.fields import Count, Positive, Settings, Split, WholeNumber

FROM = "from"  # key of a stage: the earlier stage it takes weights from; a list for a task with `runs`; null: none
INIT = "init"  # key of a stage: a path to weights of its own; null: none of its own
HeightKey = str | Annotated[list[str], Field(min_length=2, max_length=2)]  # stage/number; a list: and a part of it


class EvaluateSettings(Settings):
    """`task=evaluate`."""

    split: Split
    batch_size: Count  # images per forward pass
    baseline_images: WholeNumber
    accuracy: bool | Literal["auto"]
    eval_masks: Count


class PredictSettings(Settings):
    """`task=predict`."""

    head: str | None
    split: Split | Literal["auto", "all"]
    batch_size: Count  # images per forward pass
    eval_masks: Count | None
    count: Count
    mistakes: WholeNumber


class PaletteTaskSettings(Settings):
    """`task=palette`."""

    split: Split
    count: Count
    compare_with: list[str]


class ImportSettings(Settings):
    """`task=import`."""

    palette: str | None
    n_head: Count | None


class ExportSettings(Settings):
    """`task=export`."""

    format: Literal["huggingface", "igpt"]
    class_head: bool
    push: str | None  # owner/name on the Hub
    private: bool | None  # of a new repository; None: as the owner's settings there have it

    @model_validator(mode="after")
    def _check_name(self) -> "ExportSettings":
        if self.push is not None and not _is_repository(self.push):
            raise ValueError(
                f"task.push must be owner/name of a model on the Hub: letters, digits, - . and _, at most 96, got "
                f"{self.push!r}"
            )
        if self.private is not None and self.push is None:
            raise ValueError("task.private is of what is uploaded: give task.push=owner/name with it")
        return self


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError  # lazy: slow, and of uploads only
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


class CompareSettings(Settings):
    """`task=compare`."""

    runs: list[str] | str
    metric: str | None
    numbers: list[str]
    reference: dict[str, Any] | None
    all: bool


class IsoflopSettings(Settings):
    """`task=isoflop`."""

    runs: list[str] | str
    targets: list[Literal["loss", "probe", "kid", "fd_lite0"]]
    weights: Literal["all", "non_embedding"]
    width: Annotated[float, Field(ge=1, le=1e6)] | None  # factor between sizes; None: all enter a parabola
    huber: Positive | None  # share of the median value; None: squares
    bootstrap: WholeNumber  # draws


class AdviseSettings(Settings):
    """`task=advise`."""

    study: str | None
    operations: Positive | None  # floating-point operations of a training
    hours: Positive | None
    speed: Positive | None  # FLOP/s of all devices; None: the study's fastest run

    @model_validator(mode="after")
    def _check_compute(self) -> "AdviseSettings":
        if (self.operations is None) == (self.hours is None):
            raise ValueError("task.operations=1e18 or task.hours=24 says how much compute there is: give one of them")
        if self.speed is not None and self.hours is None:
            raise ValueError("task.speed turns task.hours into operations, which are given: leave it out")
        return self


class ReportSettings(Settings):
    """`task=report`."""

    runs: list[str]


class DashboardSettings(Settings):
    """`task=dashboard`."""

    project: str
    entity: str | None
    title: str
    file: str


class PipelineSettings(Settings):
    """`task=pipeline`: `stages`: name → settings (null: omitted); `bars`: picture → group → series → stage/number;
    `curves`: picture → name → stage/curve.
    """

    stages: dict[str, dict[str, Any] | None]
    bars: dict[str, dict[str, dict[str, HeightKey]]]
    curves: dict[str, dict[str, str]]

    @property
    def active_stages(self) -> dict[str, Mapping[str, Any]]:
        """The stages that are not omitted, in order."""
        return {name: settings for name, settings in self.stages.items() if settings is not None}

    @model_validator(mode="after")
    def _check_names(self) -> "PipelineSettings":
        before: list[str] = []
        for name, settings in self.active_stages.items():
            start = settings.get(FROM)
            if not isinstance(start, str | list | None):
                raise ValueError(f"task.stages.{name}.from must be the name of a stage, or a list, got {start!r}")
            if not isinstance(own := settings.get(INIT), str | None):
                raise ValueError(f"task.stages.{name}.init must be a path to weights, or null, got {own!r}")
            if own is not None and FROM in settings:
                raise ValueError(f"task.stages.{name} has weights of its own, init={own}, and from={start}: choose one")
            for source in [start] if isinstance(start, str) else start or []:
                if source not in before:
                    earlier = ", ".join(before) or "none"
                    raise ValueError(f"task.stages.{name}.from: there is no stage {source!r} before it, but {earlier}")
            before.append(name)
        bars = [key for groups in self.bars.values() for series in groups.values() for key in series.values()]
        drawn = [("bars", key) for each in bars for key in ([each] if isinstance(each, str) else each)]
        drawn += [("curves", key) for lines in self.curves.values() for key in lines.values()]
        for where, key in drawn:
            if key.partition("/")[0] not in self.stages:
                raise ValueError(f"task.{where}: {key} is to begin with the name of a stage: {', '.join(before)}")
        return self
