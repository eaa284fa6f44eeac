"""The picture of one target of a scaling study: IsoFLOP curves, optima over compute, and the surface."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from igpt.report.style import save_figure, styled
from igpt.scaling_law.parabola import PowerLaw
from igpt.scaling_law.study import TargetFit, format_count

BEYOND = 1.5  # factor by which lines go beyond the runs


@styled
def isoflop_figure(path: Path, fit: TargetFit, *, weights: str) -> None:
    """Writes four plots: the target over N with parabolas (minima filled, those at an edge hollow), N* and D* over the
    budget with the power laws of both methods, and the surface's contours over N and D with the runs.

    `weights`: the kind of weights that N counts, for the labels.
    """
    figure = Figure(figsize=(11, 8.6), layout="constrained")
    top, bottom = figure.subplots(2, 2)
    name = f"weights N ({weights.replace('_', '-')})"
    _draw_curves(top[0], fit, name)
    laws = fit.minima.of_weights, fit.minima.of_tokens
    for axes, law, which, label in zip((top[1], bottom[0]), laws, (0, 1), (name, "tokens D"), strict=True):
        _draw_optima(axes, fit, law, which)
        axes.set(xlabel="budget C, FLOP", ylabel=f"compute-optimal {label}")
    _draw_surface(bottom[1], fit, name)
    save_figure(path, figure)


def _draw_curves(axes: Axes, fit: TargetFit, name: str) -> None:
    for i, (curve, ink) in enumerate(zip(fit.minima.curves, _inks(fit), strict=True)):
        x, y = 10**curve.log_weights, curve.values
        axes.plot(x[curve.is_used], y[curve.is_used], "o", ms=5, color=ink, label=f"{curve.operations:.3g} FLOP")
        axes.plot(x[~curve.is_used], y[~curve.is_used], "x", ms=5, color=ink)
        ends = np.linspace(*curve.ends, 60)
        axes.plot(10**ends, np.polyval(curve.parabola, ends), lw=1.2, color=ink)
        is_inside = i in fit.minima.inside
        low, high = curve.ends
        at_end = low if np.polyval(curve.parabola, low) < np.polyval(curve.parabola, high) else high
        place = curve.minimum if curve.minimum is not None else at_end
        axes.plot(
            10**place, np.polyval(curve.parabola, place), "*", ms=13, color=ink, markeredgecolor="black",
            markerfacecolor=ink if is_inside else "white", markeredgewidth=0.8, zorder=4,
        )  # fmt: skip
    axes.set(xlabel=name, ylabel=fit.label, xscale="log")
    _count_ticks(axes, "x")
    axes.legend(
        fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), title_fontsize=8,
        title="★ minimum, ☆ at the edge of the grid; × not in the parabola", columnspacing=1.0, handletextpad=0.1,
    )  # fmt: skip


def _draw_optima(axes: Axes, fit: TargetFit, law: PowerLaw | None, which: int) -> None:
    """Minima over budgets: N* (which = 0) or D* (1)."""
    curves, inside = fit.minima.curves, fit.minima.inside
    budgets = np.array([curve.operations for curve in curves])
    line = np.geomspace(budgets.min() / BEYOND, budgets.max() * BEYOND, 40)
    values = 10 ** (fit.minima.log_weights, fit.minima.log_tokens)[which] if inside else np.array([])
    for place, i in enumerate(inside):
        draws = fit.minima.draws[which, :, place]
        known = 10 ** draws[np.isfinite(draws)]
        if len(known):
            axes.plot([budgets[i]] * 2, np.percentile(known, [2.5, 97.5]), lw=1.4, color=_inks(fit)[i])
        axes.plot(budgets[i], values[place], "*", ms=12, color=_inks(fit)[i], markeredgecolor="black")
    if law is not None:
        label = f"parabolas: exponent {law.exponent:.3f}"
        if law.interval is not None:
            label += f" [{law.interval[0]:.3f}, {law.interval[1]:.3f}]"
        axes.plot(line, [law.predict(c) for c in line], lw=1.4, color="black", label=label)
    exponents = fit.exponents
    if fit.surface is not None and "surface_a" in exponents:
        n = np.array([fit.surface.surface.find_optimum(c, fit.surface.gamma, fit.surface.log_factor) for c in line])
        tokens = line / (10**fit.surface.log_factor * n**fit.surface.gamma)
        value, interval = exponents["surface_a" if which == 0 else "surface_b"]
        label = f"surface: exponent {value:.3f}" + (
            "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        )
        axes.plot(line, n if which == 0 else tokens, "--", lw=1.2, color="tab:gray", label=label)
    axes.set(xscale="log", yscale="log")
    _count_ticks(axes, "y")
    _count_ticks(axes, "x")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "no exponent: see the table", ha="center", transform=axes.transAxes, color="gray")
        axes.set(xticks=[], yticks=[])
        axes.minorticks_off()


def _draw_surface(axes: Axes, fit: TargetFit, name: str) -> None:
    samples, surface = fit.samples, fit.surface
    for group, ink in zip(samples.budgets, _inks(fit), strict=True):
        axes.plot(
            samples.weights[group], samples.tokens[group], "o", ms=5, color=ink, markeredgecolor="white", zorder=3
        )
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel="tokens D")
    for axis in ("x", "y"):
        _count_ticks(axes, axis)
    if surface is None:
        return
    n, d = (
        np.geomspace(values.min() / BEYOND, values.max() * BEYOND, 80) for values in (samples.weights, samples.tokens)
    )
    grid = surface.surface.predict(n[None, :], d[:, None])
    low, high = samples.values.min(), np.quantile(samples.values, 0.95)
    levels = np.linspace(low - 0.15 * (high - low), high, 12)
    drawn = axes.contour(n, d, grid, levels=levels, cmap="viridis_r", linewidths=0.9)
    axes.clabel(drawn, fontsize=7, fmt="%.3g")
    if surface.is_determined:
        budgets = np.geomspace(samples.operations.min() / 3, samples.operations.max() * 3, 60)
        path = np.array([surface.surface.find_optimum(c, surface.gamma, surface.log_factor) for c in budgets])
        tokens = budgets / (10**surface.log_factor * path**surface.gamma)
        axes.plot(path, tokens, "--", lw=1.2, color="tab:gray", label="compute-optimal, by the surface")
        axes.legend(fontsize=8, loc="upper right")
    else:
        axes.set_title("not determined by these runs", fontsize=9, color="gray")
    axes.set(xlim=(n[0], n[-1]), ylim=(d[0], d[-1]))


def _inks(fit: TargetFit) -> list[tuple[float, float, float, float]]:
    """A colour of each budget, from the cheapest to the dearest."""
    return [matplotlib.colormaps["plasma"](x) for x in np.linspace(0.05, 0.8, len(fit.minima.curves))]


def _count_ticks(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if which == "y" or axes.get_xlim()[1] < 1e11 else (1, 3), numticks=12)
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value).replace("+", "")))
    axis.set_minor_formatter(NullFormatter())
