"""Several datasets as one training stream, sampled by weight. One of them provides the held-out splits."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from igpt.data.images import Images
from igpt.data.listing import ListFiles, list_files
from igpt.data.source import Split, check_split_name
from igpt.data.stream import ImageStream, refuse_val
from igpt.settings.data import MixtureStreamSettings, Resolution
from igpt.settings.fields import NonNegative


class Mixture:
    """A `Source` with training images from several streams. Settings: `conf/data/imagenet64_web.yaml`.

    Raises:
        ValueError: a dataset that is not streamed, different resolutions, or weights with other names or a sum of 0.
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
        """A split of the `held_out` dataset; train are its own images, to which the palette is fitted."""
        check_split_name(name)
        return self._held_out.split(name)

    def training(self, *, with_val: bool = False) -> ImageStream:
        refuse_val(with_val)
        return self._training
