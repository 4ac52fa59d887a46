"""The comparison page in a real Chromium: every chart is drawn, nothing is fetched, nothing a model wrote runs, it fits a phone."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.comparison import Answer, ItemText, Subject, TokenAnswers, Verdicts, compare
from evaluation.harness.result import BenchmarkResult, ScoreRow
from evaluation.pages.comparison_page import render_comparison
from tests.browser.pages import SCREENSHOTS, list_charts, show_file

ATTACK = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
BENCHMARKS = {"mmlu": (200, 0.55), "gsm8k": (120, 0.4), "humaneval": (60, 0.3), "bbh": (90, 0.5)}
ANSWERS = (
    "Knead the dough for ten minutes, then let it rest.",
    "Knead the dough for five minutes and let it rest until it doubles.",
    "I would rather not say.",
)
JUDGED = ((0.2, 0.3, 0.1, 0.3, 0.1), (0.1, 0.2, 0.1, 0.4, 0.2), (0.3, 0.3, 0.1, 0.2, 0.1))
NAMES = ("champion", "train/3f2a91c07d4e", "embedded:smollm2-135m-instruct")


def make_subject(place: int) -> Subject:
    """Return a model that answers a tenth of the items otherwise than the first one does."""
    results, texts = {}, {}
    for name, (n, level) in BENCHMARKS.items():
        base = np.random.default_rng(len(name)).random(n) < level
        flipped = np.random.default_rng(place).random(n) < (0.1 if place else 0.0)
        items = {(f"{name}_{k % 4}", str(k)): float(score) for k, score in enumerate(base ^ flipped)}
        row = ScoreRow(
            benchmark=name, task=name, metric="acc", filter="none", value=float(np.mean([*items.values()])), stderr=None, n=n,
            task_version=1, num_fewshot=0, decides=True, harness_version="0.4.13",
        )  # fmt: skip
        results[name] = BenchmarkResult(benchmark=name, scores=(row,), items=items, profile={})
        texts[name] = {key: ItemText(f"Question {key[1]}\nAnswer:", f"{ANSWERS[place]} {ATTACK}", "B") for key in items}
    gains = np.random.default_rng(7).normal(0, 1, 60) + 0.6 * (place == 1)
    rows = [f"row{k}" for k in range(60)]
    scattered = gains + np.random.default_rng(place).normal(0.3 * place, 0.8, 60)
    margins = np.random.default_rng(place).choice([-2, -1, 0, 1, 2], size=(150, 2), p=JUDGED[place]).tolist()
    return Subject(
        name=NAMES[place],
        ref=f"train/{place}" * 8,
        results=results,
        texts=texts,
        answers={
            row: Answer(f"user: How do I bake bread {k}?", (ANSWERS[(place + k // 59) % 3],), (k % 9 == 0,))
            for k, row in enumerate(rows)
        },
        rewards={
            row: float(gain)
            for row, gain in zip(rows, gains + np.random.default_rng(place).normal(0, 0.4, 60), strict=True)
        },
        sets={
            name: {f"{name}{k}": float(gain) for k, gain in enumerate(scattered)}
            for name in ("hha_helpful", "hha_harmless", "offsetbias")[: 3 - place // 2]
        },
        verdicts={
            "arena_hard": Verdicts(
                "win rate against gpt-4-0314, judge judge@2026", {}, {f"q{k}": own for k, own in enumerate(margins)}
            )
        },
        tokens={
            row: TokenAnswers(*map(score_words, (ANSWERS[k // 59], ANSWERS[(1 + k // 59) % 3])))
            for k, row in enumerate(rows)
        }
        if place == 1
        else {},
        settings={}
        if place == 2
        else {"train.lambda_": (0.5, 0.2)[place], "train.seed": 0, "train.base": "embedded:smollm2 (ba5e)"},
        data={} if place == 2 else {"rows": 163, "quarantined": 6},
        rows=frozenset() if place == 2 else frozenset(map(str, range(place, 163 + place))),
        cost={"train": 61.2, "measuring: mmlu": 12.5}
        | ({"all of it, USD": 0.0123, "without a price, seconds": 1.0} if place else {}),
    )


def score_words(text: str) -> list[tuple[str, float, float]]:
    """Return words as tokens that move by everything from much less to much more likely, and the token that ends an answer."""
    words = re.findall(r"\s*\S+", text)
    moves = np.random.default_rng(len(text)).choice([-3.1, -0.8, -0.2, 0.0, 0.05, 0.3, 1.1, 2.7], len(words) + 1)
    return [(word, -2.0, -2.0 + float(move)) for word, move in zip([*words, "<|im_end|>"], moves, strict=True)]


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
        page.locator("#scores").screenshot(path=SCREENSHOTS / f"comparison-scores-{scheme}-{width}.png")
        shown = page.locator("#scores tbody th").all_inner_texts()
        assert any("150 questions" in name for name in shown) and any(name.startswith("hha_helpful") for name in shown)
        page.locator("#flips").scroll_into_view_if_needed()
        page.locator("#flips summary").nth(1).click()
        assert page.locator("#flips .sample").first.get_by_text("onerror").first.is_visible(), "shown as text"
        page.screenshot(path=SCREENSHOTS / f"comparison-flips-{scheme}-{width}.png")
        page.locator("#samples").evaluate("node => node.scrollIntoView({block: 'start'})")
        page.screenshot(path=SCREENSHOTS / f"comparison-samples-{scheme}-{width}.png")
        token = page.locator("#samples .sample .tok").first
        assert re.fullmatch(
            r"[+−]\d\.\d\d nats: log-probability −2\.00 under champion, .*", token.get_attribute("title")
        )
        styles = {
            mark: page.locator(f"#key .{mark}").evaluate("node => getComputedStyle(node).borderBottom.split(' rgb')[0]")
            for mark in ("up1", "up2", "up3", "down1", "down2", "down3")
        }
        assert len(set(styles.values())) == 6, "each is told from the others without colour"
        if width > 1000:
            page.add_style_tag(content="html { filter: grayscale(1); }")
            page.screenshot(path=SCREENSHOTS / f"comparison-samples-grey-{scheme}.png")
