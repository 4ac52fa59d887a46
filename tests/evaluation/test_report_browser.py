"""The report in a real Chromium: every chart is drawn, nothing is fetched, nothing a model wrote runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.alignment import Answers, measure
from evaluation.config import GatePolicy
from evaluation.gate.decide import Evidence, decide
from evaluation.harness.contamination import Contamination, Hit, Level
from evaluation.pages.report import ReportData, RewardPair, SampleAnswer, StepRow, render_report
from evaluation.reward_bias import Accuracy, RewardBias
from tests.browser.pages import SCREENSHOTS, list_charts, show_file

ATTACK = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


def answers(reward_P: np.ndarray) -> Answers:
    rows = [f"{i:032x}" for i in range(len(reward_P))]
    rewards = {row: [float(reward)] for row, reward in zip(rows, reward_P, strict=True)}
    return Answers(rewards, {row: [120] for row in rows}, truncated_share=0.1, empty_share=0.0, dropped=0)


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
    right = Accuracy(group=ATTACK, n=100, accuracy=0.4, low=0.3, high=0.5, length_baseline=0.2)
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
        alignment=tuple(measure(name, answers(gain_P), answers(0 * gain_P)) for name in ("hha_helpful", ATTACK)),
        reward_tests=(
            RewardBias(
                name="llmbar",
                overall=right,
                groups=(right,),
                macro_accuracy=0.4,
                longer_preferred=0.8,
                length_spearman=None,
            ),
        ),
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
        assert list_charts(page) == {
            "rewards", "gains", "alignment_gains", "alignment_wins", "accuracy", "reward_tests", "quarantine", "cost",
        }  # fmt: skip
        assert page.title().startswith("PROMOTE · a run </script>")  # shown, not run
        page.screenshot(path=SCREENSHOTS / f"report-{scheme}-{width}.png")
        page.locator("#cost").scroll_into_view_if_needed()
        page.screenshot(path=SCREENSHOTS / f"report-cost-{scheme}-{width}.png")
