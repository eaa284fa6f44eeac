"""The loss by position as a PNG: nats per token over the image, and over the positions row by row."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from igpt.report.style import DPI, REFERENCE, save_figure, styled


@styled
def position_figure(path: Path, nats: np.ndarray) -> None:
    """Writes the mean nats of each cell of the token grid (R, C): a map of the image, and the curve in raster order."""
    figure = Figure(figsize=(9, 3.6), dpi=DPI)
    of_image = figure.add_axes((0.01, 0.06, 0.36, 0.84))
    shown = of_image.imshow(nats, cmap="viridis", interpolation="nearest")
    of_image.set(xticks=[], yticks=[])
    of_image.set_title("over the image", fontsize=10)
    bar = figure.colorbar(shown, cax=figure.add_axes((0.375, 0.06, 0.015, 0.84)))
    bar.outline.set_visible(False)
    curve = figure.add_axes((0.53, 0.15, 0.45, 0.75))
    curve.plot(np.arange(1, nats.size + 1), nats.ravel(), lw=1.2)
    mean = float(nats.mean())
    curve.axhline(mean, **REFERENCE)
    curve.text(nats.size, mean, f"mean {mean:.3f}", ha="right", va="bottom", fontsize=9)
    curve.set(xlabel="position, row by row", ylabel="nats per token", xlim=(1, max(2, nats.size)))
    save_figure(path, figure)
