"""The comparison page in a real Chromium: every chart is drawn, nothing is fetched, nothing a model wrote runs, it fits a phone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.comparison import Answer, ItemText, Subject, compare
from evaluation.comparison_page import render_comparison
from evaluation.result import BenchmarkResult, ScoreRow
from tests.browser.pages import SCREENSHOTS, list_charts, show_file

ATTACK = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
BENCHMARKS = {"mmlu": (200, 0.55), "gsm8k": (120, 0.4), "humaneval": (60, 0.3), "bbh": (90, 0.5)}
ANSWERS = (
    "Knead the dough for ten minutes, then let it rest.",
    "Knead the dough for five minutes and let it rest until it doubles.",
    "I would rather not say.",
)
NAMES = ("champion", "train/3f2a91c07d4e", "embedded:smollm2-135m-instruct")


def make_subject(place: int) -> Subject:
    """Return a model that answers a tenth of the items otherwise than the first one does."""
    results, texts = {}, {}
    for name, (n, level) in BENCHMARKS.items():
        base = np.random.default_rng(len(name)).random(n) < level
        flipped = np.random.default_rng(place).random(n) < (0.1 if place else 0.0)
        items = {(name, str(k)): float(score) for k, score in enumerate(base ^ flipped)}
        row = ScoreRow(
            benchmark=name, task=name, metric="acc", filter="none", value=float(np.mean([*items.values()])), stderr=None, n=n,
            task_version=1, num_fewshot=0, decides=True, harness_version="0.4.13",
        )  # fmt: skip
        results[name] = BenchmarkResult(benchmark=name, scores=(row,), items=items, profile={})
        texts[name] = {key: ItemText(f"Question {key[1]}\nAnswer:", f"{ANSWERS[place]} {ATTACK}", "B") for key in items}
    gains = np.random.default_rng(7).normal(0, 1, 60) + 0.6 * (place == 1)
    rows = [f"row{k}" for k in range(60)]
    return Subject(
        name=NAMES[place],
        ref=f"train/{place}" * 8,
        results=results,
        texts=texts,
        answers={
            row: Answer("user: How do I bake bread?", (ANSWERS[(place + k // 59) % 3],), (k % 9 == 0,))
            for k, row in enumerate(rows)
        },
        rewards={
            row: float(gain)
            for row, gain in zip(rows, gains + np.random.default_rng(place).normal(0, 0.4, 60), strict=True)
        },
        settings={}
        if place == 2
        else {"train.lambda_": (0.5, 0.2)[place], "train.seed": 0, "train.base": "embedded:smollm2 (ba5e)"},
        data={} if place == 2 else {"rows": 163, "quarantined": 6},
        rows=frozenset() if place == 2 else frozenset(map(str, range(place, 163 + place))),
        cost={"train": 61.2, "measuring: mmlu": 12.5},
    )


def write_page(folder: Path) -> Path:
    subjects = tuple(map(make_subject, range(3)))
    links = {
        "Prefect run": "http://127.0.0.1:4200/runs/flow-run/1",
        "MLflow run": "http://127.0.0.1:5500/#/experiments/1",
    }
    (folder / "comparison.html").write_text(render_comparison(compare(subjects), subjects, links=links))
    return folder / "comparison.html"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_comparison_draws_offline_and_runs_nothing_foreign(
    chromium: Any, tmp_path: Path, scheme: Any, width: int
) -> None:
    with show_file(chromium, write_page(tmp_path), scheme=scheme, width=width) as page:
        assert list_charts(page) == {"benchmarks", "reward", "rewards", "lengths"}
        assert page.title() == " · ".join(NAMES)
        assert any("rather not say" in text for text in page.locator("#samples mark").all_inner_texts())
        page.screenshot(path=SCREENSHOTS / f"comparison-{scheme}-{width}.png")
        page.locator("#flips").scroll_into_view_if_needed()
        page.locator("#flips summary").nth(1).click()
        assert page.locator("#flips .sample").first.get_by_text("onerror").first.is_visible(), "shown as text"
        page.screenshot(path=SCREENSHOTS / f"comparison-flips-{scheme}-{width}.png")
        page.locator("#samples").scroll_into_view_if_needed()
        page.screenshot(path=SCREENSHOTS / f"comparison-samples-{scheme}-{width}.png")
