"""Settings of the tasks that sample images."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from igpt.settings.fields import Count, FeatureDtype, Layer, Norm, Settings, Share, Split, Temperature, WholeNumber

TopP = Annotated[float, Field(gt=0, le=1)]


class SamplingSettings(Settings):
    """How images are drawn."""

    batch_size: Count  # images sampled at a time
    temperature: Temperature
    top_k: Count | None
    top_p: TopP | None


class SampleSettings(SamplingSettings):
    """`task=sample`."""

    count: Count


class QualitySettings(SamplingSettings):
    """`task=quality`."""

    runs: list[str]
    encoder: str
    samples: Count
    completions: WholeNumber
    held_out_images: Count
    training_images: Count
    baselines: list[Literal["untrained", "tokenized"]]


class CompleteSettings(SampleSettings):
    """`task=complete`."""

    split: Split
    completions: Count
    fraction: Share
    rows: WholeNumber | None


class DemoSettings(Settings):
    """`task=demo`."""

    head: str | None
    host: str
    port: Annotated[int, Field(ge=1, le=65535)] | None
    threads: Count | None
    split: Split
    choices: Count
    rows: WholeNumber | None
    completions: Count
    at_most: Count
    temperature: Temperature
    top_k: Count | None
    allowed_hosts: list[str]
    upload_mb: Annotated[float, Field(ge=0.001, le=1e6)]
    uploads_mb: Annotated[float, Field(ge=0.001, le=1e6)]
    uploads: Count
    upload_seconds: Annotated[float, Field(ge=1, le=1e6)]
    upload_pixels: Count
    nearest: Count
    among: Count
    layer: Layer
    norm: Norm
    dtype: FeatureDtype
    batch_size: Count

    @model_validator(mode="after")
    def _check_completions(self) -> "DemoSettings":
        if self.completions > self.at_most:
            raise ValueError(f"task.completions must lie in 1 … task.at_most ({self.at_most}), got {self.completions}")
        if self.upload_mb >= self.uploads_mb:
            raise ValueError(f"task.upload_mb {self.upload_mb:g} must be below task.uploads_mb {self.uploads_mb:g}")
        return self
