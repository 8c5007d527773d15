"""Style of all plots. Its colours differ for colour-blind readers, and its markers in a black-and-white print."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

#: Okabe and Ito's palette, safe for colour-blind readers, and a marker for each colour.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
OTHERS, REFERENCE, UNKNOWN = "#cccccc", "#555555", "#dddddd"
SMALL, NORMAL = 8, 9


class Plot(Figure):
    """A figure that a notebook displays without pyplot. Plain figures need an import of pyplot."""

    def __init__(self, width: float, height: float):
        super().__init__(figsize=(width, height), layout="constrained")

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def label(name: str, most: int = 32) -> str:
    """A name, shortened to fit into a plot. Dollar signs are escaped, because they would start a formula."""
    name = " ".join(name.split())
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", "\\$")


def heat_map(
    axis: Axes,
    grid: np.ndarray,
    norm: Normalize | None = None,
    cmap: str = "cividis",
    spec: str | None = None,
    fontsize: float = 6,
) -> AxesImage:
    """
    Draw a grid (rows, columns), first row at the top. NaN is grey; if values are written, it is a dash.

    Parameters
    ----------
    axis : Axes
    grid : array of float
    norm : Normalize, optional
        Default: from 0 to 1.
    cmap : str
        Name of a colour map whose brightness rises or falls steadily.
    spec : str, optional
        Write every value in this format.
    fontsize : float
        Font size of the values.
    """
    colours = colormaps[cmap].with_extremes(bad=UNKNOWN)
    image = axis.imshow(np.ma.masked_invalid(grid), norm=norm or Normalize(0, 1), cmap=colours, aspect="auto")
    if spec is not None:
        for (row, column), value in np.ndenumerate(grid):
            text = f"{value:{spec}}" if np.isfinite(value) else "–"
            colour = "black" if not np.isfinite(value) or _bright(image, value) else "white"
            axis.text(column, row, text, ha="center", va="center", fontsize=fontsize, color=colour)
    return image


def _bright(image: AxesImage, value: float) -> bool:
    red, green, blue, _ = image.cmap(image.norm(np.asarray(value)))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.46  # black and white text have equal contrast here


def layer_map(
    grid: np.ndarray, layers: Sequence[int], columns: Sequence[str], xlabel: str, measure: str, spec: str | None = None
) -> Figure:
    """A figure with one heat map of shares, first layer at the top, and a colour bar in per cent."""
    figure = Plot(1.9 + max(2.2, 0.75 * len(columns)), 1.4 + 0.17 * len(layers))
    axis = figure.add_subplot()
    image = heat_map(axis, grid, spec=spec)
    axis.set_xticks(
        range(len(columns)),
        [label(column) for column in columns],
        fontsize=SMALL,
        rotation=30 if max(map(len, columns)) > 8 else 0,
    )
    layer_axis(axis, layers)
    axis.set_xlabel(xlabel, fontsize=NORMAL)
    share_bar(figure, image, axis, measure)
    return figure


def layer_axis(axis: Axes, layers: Sequence[int]) -> None:
    """Label the rows of a heat map with layer numbers, as many as there is room for."""
    step = -(-len(layers) // 16)
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=SMALL)
    axis.set_ylabel("layer", fontsize=NORMAL)


def share_bar(figure: Figure, image: AxesImage, axis: Axes, measure: str) -> None:
    """Add a colour bar in per cent."""
    bar = figure.colorbar(image, ax=axis, format=PercentFormatter(1, decimals=0), fraction=0.05, pad=0.03)
    bar.set_label(measure, fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL)


def line_axis(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with one axis for lines. The x axis shows whole numbers."""
    figure = Plot(5.6, 3.6)
    axis = figure.add_subplot()
    axis.set_xlabel(xlabel, fontsize=NORMAL)
    axis.set_ylabel(ylabel, fontsize=NORMAL)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=SMALL)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def spaced(labels: Sequence[str], places: Sequence[float], apart: float) -> list[str]:
    """Labels of ticks in order, empty where one would touch the label before it."""
    found: list[str] = []
    last = -np.inf
    for text, place in zip(labels, places, strict=True):
        found.append(text if place - last >= apart else "")
        last = place if found[-1] else last
    return found
