"""How every picture looks: colours that colour-blind readers tell apart, labelled axes, one size of type."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

#: Okabe and Ito's palette, without its yellow and its black, and two more.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#6A3D9A")
_MARKERS = "osX^DvPp"

_T = TypeVar("_T")

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
}


def styled(curves: Iterable[_T]) -> Iterator[tuple[_T, str, str]]:
    """Each of some curves with a colour and a marker of its own."""
    every = list(curves)
    assert len(every) <= len(_COLOURS), "a curve that has no colour would be left out"
    return zip(every, _COLOURS, _MARKERS, strict=False)


def subplots(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, as `pyplot.subplots` gives them, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(_STYLE):
        return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def add_legend(figure: Any, axes: Any, **options: Any) -> None:
    """One legend for all panels, beside them, where it hides nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", **options)


def to_png(figure: Any) -> bytes:
    """Render a figure and release it."""
    from matplotlib import pyplot as plt

    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png")
    plt.close(figure)
    return image.getvalue()
