"""Several datasets as one stream, each drawn by its weight; what is held out is held out of one of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from igpt.data.images import Images
from igpt.data.listing import ListFiles, list_files
from igpt.data.source import Split, check_split_name
from igpt.data.stream import ImageStream
from igpt.settings.data import MixtureStreamSettings, Resolution
from igpt.settings.fields import NonNegative


class Mixture:
    """A `Source` whose training images come from several streams. Settings: `conf/data/imagenet64_web.yaml`.

    Raises:
        ValueError: streams that are none, that differ in resolution, or weights that are not theirs or sum to nothing.
    """

    def __init__(
        self,
        *,
        cache: Path,
        list_files: ListFiles = list_files,
        name: str,
        resolution: Resolution,
        streams: Mapping[str, Callable[..., Images]],
        weights: Mapping[str, NonNegative],
        held_out: str,
        stream: MixtureStreamSettings,
    ) -> None:
        if weights.keys() != streams.keys():
            raise ValueError(f"data.weights is of {', '.join(weights)}, the streams are {', '.join(streams)}")
        if not sum(weights.values()):
            raise ValueError(f"data.weights are not all of them 0, got {dict(weights)}")
        if held_out not in streams:
            raise ValueError(f"data.held_out={held_out!r} is none of the streams {', '.join(streams)}")
        drawn = [key for key in streams if weights[key] > 0]
        sources = {
            key: make(cache=cache, list_files=list_files, name=key)
            for key, make in streams.items()
            if key in {*drawn, held_out}
        }
        parts = []
        for key, source in sources.items():
            images = source.training()
            if not isinstance(images, ImageStream):
                raise ValueError(f"data.streams.{key}.streaming must be true: this is a mixture of streams")
            if source.resolution != resolution:
                raise ValueError(
                    f"data.streams.{key}.resolution is {source.resolution}, data.resolution {resolution}: make them one"
                )
            parts += [replace(part, weight=float(weights[key])) for part in images.parts.values() if key in drawn]
        self._held_out = sources[held_out]
        self._training = ImageStream(parts, stream)
        self.name, self.resolution = name, resolution
        self.n_class, self.labels_per_class = self._held_out.n_class, None
        self.class_names = self._held_out.class_names

    def split(self, name: str) -> Split:
        """A split of the stream that is held out from; train is that stream's own images (the palette is theirs)."""
        check_split_name(name)
        return self._held_out.split(name)

    def training(self) -> ImageStream:
        return self._training
