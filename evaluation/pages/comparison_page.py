"""The page of a comparison: one HTML file that holds everything it shows, written like the report."""

from collections import Counter

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from evaluation.comparison import Comparison, Flip, Measure, Span, Subject, mean_characters
from evaluation.pages import report_plots
from evaluation.pages.report import make_environment

STRENGTHS = (0.1, 0.5, 2.0)  # nats, from which a token is coloured more strongly: 1.1, 1.6 and 7.4 times as likely
FLIPS_SHOWN = 12  # a benchmark and direction; comparison.json has all


def render_comparison(comparison: Comparison, subjects: tuple[Subject, ...], *, links: dict[str, str]) -> str:
    """Return the page. Equal data give the equal page."""
    environment = make_environment()
    environment.filters |= {"figure": show_figure, "tone": name_tone, "nats": show_nats, "name": show_name}
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        charts=draw_charts(comparison, subjects),
        flips=group_flips(comparison.flips),
        links=links,
        strengths=STRENGTHS,
        token_coloured=any(span.logp is not None for s in comparison.samples for own in s.answers for span in own),
        word_coloured=any(span.own for s in comparison.samples for own in s.answers for span in own),
        plotly=Markup(get_plotlyjs()),
        plot_config=report_plots.CONFIG,
    )


def show_figure(value: float, measure: Measure, *, sign: bool = False) -> str:
    """Return a reward with three decimals, a length with one."""
    digits = 1 if measure.what == "answer_characters" else 3
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def name_tone(span: Span) -> str:
    """Return the style of a token: `up` or `down` and its strength from 1 to 3, empty where the models agree."""
    difference = span.difference or 0.0
    strength = sum(abs(difference) >= least for least in STRENGTHS)
    return f"{'up' if difference > 0 else 'down'}{strength}" if strength else ""


def show_nats(logp: float, *, sign: bool = False) -> str:
    """Return nats with two decimals."""
    return f"{logp:{'+' if sign else ''}.2f}".replace("-", "−")


def draw_charts(comparison: Comparison, subjects: tuple[Subject, ...]) -> dict[str, report_plots.Figure]:
    """Return the charts for which there is data, by name."""
    charts: dict[str, report_plots.Figure] = {}
    reference = comparison.subjects[0]
    if scores := [*comparison.benchmarks, *comparison.judges]:
        rows = [row for measure in scores for row in forest_rows(measure, scale=100)]
        charts["benchmarks"] = report_plots.plot_forest(rows, x=f"difference to {reference}, points")
    if rewards := [*comparison.alignment, *([comparison.reward] if comparison.reward else [])]:
        rows = [row for measure in rewards for row in forest_rows(measure, scale=1)]
        charts["reward"] = report_plots.plot_forest(rows, x=f"difference to {reference}, reward")
    if comparison.reward:
        values = {subject.name: list(subject.rewards.values()) for subject in subjects}
        charts["rewards"] = report_plots.plot_distributions(values, x="held-out reward")
    if comparison.length:
        lengths = {s.name: [mean_characters(answer) for answer in s.answers.values()] for s in subjects}
        charts["lengths"] = report_plots.plot_distributions(lengths, x="characters of an answer")
    return charts


def forest_rows(measure: Measure, *, scale: float) -> list[tuple[str, str, float, float, float]]:
    """Return one row a difference."""
    return [
        (show_name(measure), d.subject, scale * d.difference, scale * d.low, scale * d.high)
        for d in measure.differences
    ]


def show_name(measure: Measure) -> str:
    """Return what was measured: a set, a benchmark and a judge's by the name that it has anywhere, the rest in words."""
    return {"heldout_reward": "held-out reward", "answer_characters": "answer characters"}.get(
        measure.what, measure.what
    )


def group_flips(flips: tuple[Flip, ...]) -> list[tuple[str, str, bool, int, list[Flip]]]:
    """Return (benchmark, model, won, how many there are, the first of them) in the order in which they come."""
    counts = Counter((flip.benchmark, flip.subject, flip.won) for flip in flips)
    groups = []
    for (benchmark, subject, won), count in counts.items():
        shown = [f for f in flips if (f.benchmark, f.subject, f.won) == (benchmark, subject, won)][:FLIPS_SHOWN]
        groups.append((benchmark, subject, won, count, shown))
    return groups
