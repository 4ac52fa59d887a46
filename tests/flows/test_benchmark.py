"""What `varflow benchmark` returns of its steps' summaries, and prints of it."""

from pathlib import Path
from typing import Any

import pytest

from evaluation.config import SuiteConfig
from evaluation.gate.verdict import Noise
from evaluation.harness.contamination import Contamination, Hit, Level
from evaluation.suites import limit_suite, paper, smoke
from flows.benchmark import check_suite, collect, plan_benchmark
from flows.cli import show_outcome
from flows.config import BenchmarkFlowConfig
from infra.settings import Settings
from tasks.step import Planned
from tests.flows.test_plan import NOWHERE
from training.config import Precision, Runtime


def summary(name: str, value: float, *, flag: str | None = None) -> dict[str, Any]:
    shown = {"flag_sample_1": "'a question' -> '', not 'an answer'"} if flag else {}
    return {"benchmark": name, "value": value, "flag": flag, "metrics": {f"eval/{name}/acc": value}} | shown


def test_a_whole_profile_has_its_mean_under_its_name() -> None:
    names = [b.name for b in paper().benchmarks]
    found = collect(
        paper(), [summary(name, value) for name, value in zip(names, (0.2, 0.4, 0.6, 0.8), strict=True)], {}, ()
    )
    assert found["scores"]["eval/paper/mean"] == pytest.approx(0.5)
    assert found["flags"] == {} and found["benchmarks"]["mmlu"]["value"] == 0.2


def test_a_part_of_it_has_none_and_its_flags_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    suite = limit_suite(paper(), 4)
    found = collect(
        suite,
        [summary(b.name, 0.0, flag="zero: none of 4 answers is right") for b in suite.benchmarks],
        {"gsm8k_part": [Noise(varied="batch size", runs=2, flip_rate=0.25, max_difference=0.125)]},
        (),
    )
    assert not any("paper" in name or name.split("/")[1] in {"mmlu", "bbh"} for name in found["scores"])
    show_outcome(BenchmarkFlowConfig(model="m", suite=suite), found)
    printed = capsys.readouterr().out
    assert "flagged: gsm8k_part: zero: none of 4 answers is right" in printed
    assert "'a question' -> '', not 'an answer'" in printed
    assert (
        "noise floor: gsm8k_part: 2 runs of the model alone that vary batch size differ by up to 12.5 points" in printed
    )


def test_items_that_the_model_was_trained_on_flag_a_score_beside_what_else_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite = limit_suite(paper(), 4)
    hit = Hit(task="gsm8k", doc_id="2", ngram="how many apples", row_id="a" * 32)
    levels = {
        "challenger": Level(items=4, value=0.5, stderr=0.25),
        "challenger_clean": Level(items=3, value=0.25, stderr=None),
    }
    seen = Contamination(
        benchmark="gsm8k_part",
        n=8,
        items=4,
        short=0,
        hits=1,
        champion=None,
        champion_clean=None,
        samples=(hit,),
        **levels,
    )
    names = [benchmark.name for benchmark in suite.benchmarks]
    summaries = [summary(name, 0.5, flag="empty: 2 of 4" if name == "gsm8k_part" else None) for name in names]
    clean = seen.model_copy(update={"benchmark": "mmlu_part", "hits": 0})
    found = collect(suite, summaries, {}, (clean, seen))
    assert [each["hits"] for each in found["contamination"]] == [0, 1] and found["flags"].keys() == {"gsm8k_part"}
    show_outcome(BenchmarkFlowConfig(model="m", suite=suite), found)
    printed = capsys.readouterr().out
    assert "flagged: gsm8k_part: empty: 2 of 4; gsm8k_part: 1 of 4 items (25.0%) share 8 words" in printed
    assert "the model scores 50.0 ± 25.0 points on all, without them 25.0 on 3" in printed


def test_the_batch_size_is_planned_where_scores_depend_on_it(tiny_policy: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "rows.jsonl").write_text("{}\n")

    def plan(precision: str, tokens: int) -> list[Planned]:
        benchmarks = tuple(b.model_copy(update={"precision": Precision(precision)}) for b in smoke().benchmarks)
        config = BenchmarkFlowConfig(
            model=str(tiny_policy), benchmarks=str(tmp_path / "raw"), suite=SuiteConfig(benchmarks=benchmarks),
            runtime=Runtime(microbatch_tokens=tokens),
        )  # fmt: skip
        return list(plan_benchmark(config, store=NOWHERE, settings=Settings(home=tmp_path)).evaluations)

    def prints(precision: str, tokens: int) -> list[str]:
        return [step.fingerprint for step in plan(precision, tokens)]

    assert prints("float32", 2048) == prints("float32", 4096)
    assert not set(prints("bfloat16", 2048)) & set(prints("bfloat16", 4096))
    assert {step.config.model_dump()["batch_size"] for step in plan("bfloat16", 4096)} == {16}


def test_a_suite_of_nothing_is_refused() -> None:
    nothing = SuiteConfig(benchmarks=())
    with pytest.raises(ValueError, match="no benchmarks, no prompt sets and no pair sets, so nothing would be run"):
        check_suite(BenchmarkFlowConfig(model="m", suite=nothing))
