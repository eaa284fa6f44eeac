"""The settings of `task=demo`; `conf/task/demo.yaml` says what each is for."""

from dataclasses import dataclass

from igpt.data.source import check_split_name
from igpt.model.features import NORMS
from igpt.model.generate import Sampling
from igpt.probe.features import Dtype


@dataclass(frozen=True)
class DemoSettings:
    """Settings that are in their bounds. Raises ValueError, naming the setting, for others."""

    host: str
    port: int | None
    threads: int | None
    split: str
    choices: int
    rows: int | None
    completions: int
    at_most: int
    temperature: float
    top_k: int | None
    upload_mb: float
    upload_pixels: int
    nearest: int
    among: int
    layer: int | None
    norm: str
    dtype: Dtype
    batch_size: int

    def __post_init__(self) -> None:
        check_split_name(self.split)
        Sampling(self.temperature, self.top_k, None)
        for name in ("threads", "choices", "at_most", "upload_mb", "upload_pixels", "nearest", "among", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"task.{name} must be at least 1, got {value}")
        if not 1 <= self.completions <= self.at_most:
            raise ValueError(f"task.completions must lie in 1 … task.at_most ({self.at_most}), got {self.completions}")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"task.port must lie in 1 … 65535, or be null for a free one; got {self.port}")
        if self.rows is not None and self.rows < 0:
            raise ValueError(f"task.rows must be at least 0, or null for half of the image; got {self.rows}")
        if self.norm not in NORMS:
            raise ValueError(f"task.norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
