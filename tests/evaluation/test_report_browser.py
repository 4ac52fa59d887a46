"""The report in a real Chromium: every chart is drawn, nothing is fetched, nothing a model wrote runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.config import GatePolicy
from evaluation.contamination import Contamination, Hit, Level
from evaluation.gate import Evidence, decide
from evaluation.report import ReportData, RewardPair, SampleAnswer, StepRow, render_report
from tests.browser.pages import SCREENSHOTS, list_charts, show_file

ATTACK = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


def write_page(folder: Path) -> Path:
    gain_P = np.random.default_rng(0).normal(0.4, 1.0, 60)
    rows = [f"{i:032x}" for i in range(len(gain_P))]
    gained = {row: float(gain) for row, gain in zip(rows, gain_P, strict=True)}
    lengths = dict.fromkeys(rows, 10.0)
    verdict = decide(
        GatePolicy(margins={}),
        challenger=Evidence(rewards=gained, lengths=lengths),
        champion=Evidence(rewards=dict.fromkeys(rows, 0.0), lengths=lengths),
        same_model=False,
    ).model_copy(update={"reasons": (ATTACK,)})
    level = Level(items=1319, value=0.41, stderr=0.0135)
    data = ReportData(
        title=f"a run {ATTACK}",
        recipe="demo",
        verdict=verdict,
        contamination=(
            Contamination(
                benchmark="gsm8k",
                n=13,
                items=1319,
                short=4,
                hits=1,
                samples=(Hit(task="gsm8k", doc_id="7", ngram=ATTACK, row_id="a" * 32),),
                champion=level,
                challenger=level,
                champion_clean=level,
                challenger_clean=level,
            ),
        ),
        rewards=tuple(RewardPair(champion=0.0, challenger=float(gain)) for gain in gain_P),
        samples=(SampleAnswer(prompt=ATTACK, champion=ATTACK, challenger=ATTACK),),
        data={"rows": 5, "quarantined_by_reason": {ATTACK: 3}},
        reward_model={"accuracy": 0.7, "length_baseline_accuracy": 0.6},
        steps=(
            StepRow(
                step="train", label=ATTACK, fingerprint="a" * 64, cached=False, seconds=3.0, inputs={}, device="cpu"
            ),
            StepRow(
                step="generate",
                label="champion",
                fingerprint="b" * 64,
                cached=True,
                seconds=90.0,
                inputs={},
                device="H100",
                usd=0.075,
            ),
        ),
        cost="0.075 USD, without 3 s that have no price (2.99 USD an hour and device, given).",
    )
    (folder / "report.html").write_text(render_report(data))
    return folder / "report.html"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_offline_and_runs_nothing_foreign(
    chromium: Any, tmp_path: Path, scheme: Any, width: int
) -> None:
    with show_file(chromium, write_page(tmp_path), scheme=scheme, width=width) as page:
        assert list_charts(page) == {"rewards", "gains", "accuracy", "quarantine", "cost"}
        assert page.title().startswith("PROMOTE · a run </script>")  # shown, not run
        page.screenshot(path=SCREENSHOTS / f"report-{scheme}-{width}.png")
        page.locator("#cost").scroll_into_view_if_needed()
        page.screenshot(path=SCREENSHOTS / f"report-cost-{scheme}-{width}.png")
