"""The charts of the report as Plotly figures in plain JSON: computed here, drawn in the reader's browser without any network.

Text and grid take the page's colours by CSS, light or dark; the marks below are legible on both. Colour is never alone in
telling two things apart: symbol, order or a legend says it too.
"""

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.gate.verdict import GuardState, GuardVerdict, TargetVerdict

CHALLENGER, CHAMPION = "#3b82c4", "#8a9099"
GOOD, OPEN, BAD = "#2e9e5b", "#c98500", "#d64545"
SERIES = (CHALLENGER, "#b5651d", "#7a5bb5", "#2e9e5b")  # of models against a reference
SERIES_BARS = (CHAMPION, *SERIES)
SYMBOLS = ("circle", "diamond", "square", "triangle-up")
STATES = {
    GuardState.non_inferior: (GOOD, "circle"),
    GuardState.undecided: (OPEN, "diamond"),
    GuardState.inferior: (BAD, "x"),
}
CONFIG = {"displaylogo": False, "displayModeBar": False, "responsive": True}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

Figure = dict[str, Any]


def label(text: str) -> str:
    """Return text that Plotly shows as it is: it reads a little HTML in every label."""
    return html.escape(" ".join(text.split()), quote=False)


def plot_guards(guards: Sequence[GuardVerdict]) -> Figure:
    """Return the forest plot: each guard's difference in points with its interval, and its margin."""
    names = [label(guard.benchmark) for guard in guards]
    traces: list[dict[str, Any]] = []
    for state, (colour, symbol) in STATES.items():
        rows = [guard for guard in guards if guard.state is state]
        if not rows:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": state.value,
                "x": [100 * guard.difference for guard in rows],
                "y": [label(guard.benchmark) for guard in rows],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * (guard.high - guard.difference) for guard in rows],
                    "arrayminus": [100 * (guard.difference - guard.low) for guard in rows],
                    "color": colour,
                    "thickness": 2,
                    "width": 6,
                },
                "marker": {"color": colour, "symbol": symbol, "size": 11},
                "hovertext": [label(guard.reason) for guard in rows],
                "hoverinfo": "text",
            }
        )
    margins = {
        "type": "scatter",
        "mode": "markers",
        "name": "margin: the largest acceptable loss",
        "x": [-100 * guard.margin for guard in guards],
        "y": names,
        "marker": {"symbol": "line-ns-open", "size": 24, "color": BAD, "line": {"width": 3, "color": BAD}},
        "hovertext": [f"{label(guard.benchmark)}: margin {100 * guard.margin:g} points" for guard in guards],
        "hoverinfo": "text",
    }
    layout = _layout(height=130 + 52 * len(guards), x="challenger minus champion, points", legend=True)
    layout["xaxis"] |= {"zeroline": True, "zerolinewidth": 2}
    layout["yaxis"] |= {
        "type": "category",
        "dtick": 1,
        "categoryarray": names[::-1],
        "automargin": True,
        "showgrid": False,
    }
    return {"data": [*traces, margins], "layout": layout}


def plot_forest(rows: Sequence[tuple[str, str, float, float, float]], *, x: str) -> Figure:
    """Return differences with their intervals: (name of the row, of the series, difference, low, high), a symbol each series."""
    names = list(dict.fromkeys(name for name, *_ in rows))
    series = list(dict.fromkeys(whose for _, whose, *_ in rows))
    traces = []
    for place, whose in enumerate(series):
        own = [row for row in rows if row[1] == whose]
        # side by side where several models share a row
        shift = 0.0 if len(series) == 1 else 0.36 * (place / (len(series) - 1) - 0.5)
        colour = SERIES[place % len(SERIES)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(whose),
                "x": [difference for _, _, difference, _, _ in own],
                "y": [len(names) - 1 - names.index(name) - shift for name, *_ in own],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - difference for _, _, difference, _, high in own],
                    "arrayminus": [difference - low for _, _, difference, low, _ in own],
                    "color": colour,
                    "thickness": 2,
                    "width": 6,
                },
                "marker": {"color": colour, "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 11},
                "hovertext": [
                    f"{label(n)}, {label(whose)}: {d:+.3g} [{low:+.3g}, {high:+.3g}]" for n, _, d, low, high in own
                ],
                "hoverinfo": "text",
            }
        )
    layout = _layout(height=110 + 56 * len(names), x=x, legend=len(series) > 1)
    layout["xaxis"] |= {"zeroline": True, "zerolinewidth": 2}
    layout["yaxis"] |= {
        "tickmode": "array",
        "tickvals": list(range(len(names)))[::-1],
        "ticktext": [label(name) for name in names],
        "range": [-0.6, len(names) - 0.4],
        "showgrid": False,
    }
    return {"data": traces, "layout": layout}


def plot_distributions(values: Mapping[str, Sequence[float]], *, x: str) -> Figure:
    """Return the distributions of several models over the same bins."""
    edges = _edges([value for own in values.values() for value in own])
    traces = [
        _bars(_count(own, edges), edges, name=label(name), colour=SERIES_BARS[place % len(SERIES_BARS)])
        | {"opacity": 0.62}
        for place, (name, own) in enumerate(values.items())
    ]
    layout = _layout(height=300, x=x, y="prompts", legend=True) | {"barmode": "overlay", "bargap": 0.04}
    return {"data": traces, "layout": layout}


def plot_rewards(champion: Sequence[float], challenger: Sequence[float]) -> Figure:
    """Return both models' distributions of held-out reward, over the same bins."""
    return plot_distributions({"champion": champion, "challenger": challenger}, x="held-out reward")


def plot_gains(gains: Sequence[float], target: TargetVerdict) -> Figure:
    """Return the distribution of each prompt's gain, with the mean and its interval marked."""
    edges = _edges(gains)
    bars = _bars(_count(gains, edges), edges, name="prompts", colour=CHALLENGER)
    layout = _layout(height=300, x="gain in reward on the same prompt", y="prompts") | {
        "bargap": 0.04,
        "shapes": [
            _band(target.low, target.high, colour=GOOD if target.superior else OPEN),
            _line(0.0, dash="solid", colour=CHAMPION),
            _line(target.gain, dash="dash", colour=GOOD if target.superior else OPEN),
        ],
    }
    return {"data": [bars], "layout": layout}


def plot_curves(lines: Sequence[Mapping[str, float]], series: Mapping[str, str], *, title: str) -> Figure | None:
    """Return metrics over optimiser steps, by the name each has in the legend; None where no line has any."""
    traces = []
    for (name, metric), colour in zip(series.items(), (CHALLENGER, CHAMPION, *SERIES[1:]), strict=False):
        points = [(line["step"], line[metric]) for line in lines if metric in line and "step" in line]
        if not points:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(points) <= 60 else "lines",
                "name": name,
                "x": [step for step, _ in points],
                "y": [value for _, value in points],
                "line": {"color": colour, "width": 2},
                "marker": {"size": 5},
                "hovertemplate": f"{name}, step %{{x}}: %{{y:.4g}}<extra></extra>",
            }
        )
    if not traces:
        return None
    return {"data": traces, "layout": _layout(height=260, x="optimiser step", y=title, legend=len(traces) > 1)}


def plot_weights(weights: Sequence[float]) -> Figure:
    """Return the distribution of the responses' weights; 1 is plain fine-tuning."""
    edges = _edges(weights)
    bars = _bars(_count(weights, edges), edges, name="responses", colour=CHALLENGER)
    layout = _layout(height=260, x="weight of a response (1: as in plain fine-tuning)", y="responses of all steps")
    layout |= {"bargap": 0.04, "shapes": [_line(1.0, dash="dash", colour=CHAMPION)]}
    return {"data": [bars], "layout": layout}


def plot_counts(counts: Mapping[str, float], *, x: str, colour: str = CHALLENGER) -> Figure:
    """Return horizontal bars, the largest on top."""
    ordered = sorted(counts.items(), key=lambda pair: pair[1])
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [value for _, value in ordered],
        "y": [label(name) for name, _ in ordered],
        "marker": {"color": colour},
        "text": [f"{value:,g}" for _, value in ordered],
        "textposition": "auto",
        "hoverinfo": "none",
    }
    layout = _layout(height=90 + 34 * len(ordered), x=x) | {"bargap": 0.35}
    _bar_axes(layout)
    return {"data": [bars], "layout": layout}


def plot_accuracy(accuracy: float, baseline: float) -> Figure:
    """Return the reward model's pairwise accuracy beside "the longer response wins" and chance."""
    rows = [("longer wins", baseline, CHAMPION), ("reward model", accuracy, CHALLENGER)]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [100 * value for _, value, _ in rows],
        "y": [name for name, _, _ in rows],
        "marker": {"color": [colour for _, _, colour in rows]},
        "text": [f"{100 * value:.1f} %" for _, value, _ in rows],
        "textposition": "auto",
        "hoverinfo": "none",
    }
    layout = _layout(height=190, x="held-out pairs ranked right, %") | {"bargap": 0.35}
    _bar_axes(layout)
    layout["xaxis"] |= {"range": [0, 100]}
    layout["shapes"] = [_line(50.0, dash="dot", colour=CHAMPION)]
    return {"data": [bars], "layout": layout}


def plot_cost(steps: Sequence[tuple[str, float, bool]]) -> Figure:
    """Return seconds of (title, seconds, cached) in the order of the run; what a cached step cost when it was computed is hatched."""
    titles = [f"{place}. {label(title)}" for place, (title, _, _) in enumerate(steps, start=1)]
    traces = []
    for name, cached, marker in (
        ("computed in this run", False, {"color": CHALLENGER}),
        ("cached: what it cost when it was computed", True, {"color": CHAMPION, "pattern": {"shape": "/"}}),
    ):
        rows = [(title, seconds) for title, (_, seconds, kept) in zip(titles, steps, strict=True) if kept is cached]
        if rows:
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": name,
                    "x": [seconds for _, seconds in rows],
                    "y": [title for title, _ in rows],
                    "marker": marker,
                    "hovertext": [f"{title}: {seconds:.1f} s" for title, seconds in rows],
                    "hoverinfo": "text",
                }
            )
    layout = _layout(height=130 + 26 * len(steps), x="seconds", legend=True) | {"barmode": "overlay", "bargap": 0.3}
    _bar_axes(layout)
    layout["yaxis"] |= {"categoryarray": titles[::-1]}
    return {"data": traces, "layout": layout}


def _bar_axes(layout: dict[str, Any]) -> None:
    """Give horizontal bars a name each, and few enough ticks for a narrow screen."""
    layout["xaxis"] |= {"nticks": 4}
    layout["yaxis"] |= {"type": "category", "dtick": 1, "automargin": True, "showgrid": False}


def _layout(*, height: int, x: str, y: str = "", legend: bool = False) -> dict[str, Any]:
    title = {"font": {"size": 13}}
    # Invisible ticks keep the labels off the marks.
    ticks = {"ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}
    axis = {
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
        "showline": False,
        "tickangle": 0,
        "nticks": 8,
    } | ticks
    return {
        "height": height,
        "margin": {"l": 8, "r": 16, "t": 36 if legend else 10, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 13},
        "xaxis": axis | {"title": title | {"text": x}},
        "yaxis": axis | ({"title": title | {"text": y}} if y else {}),
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"},
        "showlegend": legend,
        "dragmode": False,
        "hoverlabel": {"bgcolor": "#20262d", "bordercolor": "#20262d", "font": {"color": "#ffffff"}, "align": "left"},
    }


def _edges(values: Sequence[float]) -> list[float]:
    """Return equal bins over the values: about the root of their number, from 6 to 40."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    bins = max(6, min(40, math.ceil(2 * math.sqrt(len(values)))))
    return [float(edge) for edge in np.linspace(low, high, bins + 1)]


def _count(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    return [int(count) for count in np.histogram(values, bins=np.asarray(edges))[0]]


def _bars(counts: Sequence[int], edges: Sequence[float], *, name: str, colour: str) -> dict[str, Any]:
    spans = list(itertools.pairwise(edges))
    return {
        "type": "bar",
        "name": name,
        "x": [(low + high) / 2 for low, high in spans],
        "width": [high - low for low, high in spans],
        "y": counts,
        "marker": {"color": colour, "line": {"width": 0}},
        "hovertext": [f"{low:.3g} to {high:.3g}: {n} {name}" for (low, high), n in zip(spans, counts, strict=True)],
        "hoverinfo": "text",
    }


def _line(x: float, *, dash: str, colour: str) -> dict[str, Any]:
    ends = {"x0": x, "x1": x, "y0": 0, "y1": 1}
    return {"type": "line", "xref": "x", "yref": "paper", **ends, "line": {"color": colour, "width": 2, "dash": dash}}


def _band(low: float, high: float, *, colour: str) -> dict[str, Any]:
    ends = {"x0": low, "x1": high, "y0": 0, "y1": 1}
    band = {"type": "rect", "xref": "x", "yref": "paper", **ends, "line": {"width": 0}, "layer": "below"}
    return band | {"fillcolor": colour, "opacity": 0.25}
