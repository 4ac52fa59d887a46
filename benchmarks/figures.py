"""Figures of measurements: SVG with texts as texts, the same file for the same numbers."""

from pathlib import Path
from typing import Any


def start_figure() -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    import matplotlib  # only where something is drawn

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "varflow", "svg.fonttype": "none"}
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(8, 5))


def finish_figure(figure: Any, axes: Any, path: Path) -> None:
    """Add grid and legend and write the file."""
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
