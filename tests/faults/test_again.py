"""The same run again, at once or later, and what one change of the config reaches."""

from collections import Counter
from typing import Any

import pytest

from infra.store import Store
from tests.faults.command import Command, finish, killed_at_the_end, read_records, small


def test_a_second_run_executes_nothing(varflow: Command, store: Store, done: dict[str, Any]) -> None:
    before = read_records(store)
    again = varflow.run("run", "smoke", *small())
    assert again.returncode == 0, again.stderr
    assert f"smoke: all {len(done['steps'])} steps cached, " in again.stdout
    assert read_records(store) == before


def test_what_a_run_says_as_json(done: dict[str, Any]) -> None:
    assert {"verdict", "steps", "prefect_run", "mlflow_run", "report"} <= done.keys()
    assert done["verdict"] in {"PROMOTE", "HOLD", "REJECT"}
    for step in done["steps"]:
        assert {"step", "fingerprint", "cached", "seconds"} <= step.keys()
        assert len(step["fingerprint"]) == 64 and step["seconds"] >= 0
    assert done["report"].endswith("report.html")


def test_another_lambda_reaches_training_and_what_follows(varflow: Command, done: dict[str, Any]) -> None:
    plan = varflow.ask("run", "smoke", "--dry-run", *small(train__lambda_=0.3))["steps"]
    assert [(row["step"], row["title"]) for row in plan if not row["cached"]] == [
        ("train", "train"),
        ("generate", "generate · challenger"),
        ("score_rewards", "score_rewards · challenger"),
        ("evaluate", "evaluate · mmlu_part challenger"),
        ("gate", "gate"),
        ("report", "report"),
    ]
    assert plan[[row["step"] for row in plan].index("train")]["changed"] == ["config.lambda_: 1.0 -> 0.3"]
    assert sum(row["cached"] for row in plan) == len(done["steps"]) - 6


@pytest.mark.slow
def test_two_runs_at_once_do_the_work_once(varflow: Command, store: Store, done: dict[str, Any]) -> None:
    words = ["run", "smoke", "--json", *small(train__seed=4)]
    before = read_records(store)
    with killed_at_the_end(varflow.start(*words)) as one, killed_at_the_end(varflow.start(*words)) as other:
        ended = [finish(one), finish(other)]
    assert [run.returncode for run in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    new = read_records(store).keys() - before.keys()
    assert Counter(name.partition("/")[0] for name in new) == Counter(
        ["train", "generate", "score_rewards", "evaluate", "gate", "report"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "needed", "not_needed"),
    [
        ({"train__objective": "dpo"}, {"score_reference"}, {"score_rewards", "score_cross"}),
        ({"train__normaliser": "cross_batch"}, {"score_reference", "score_rewards", "score_cross"}, set()),
    ],
)
def test_other_objectives_come_to_a_verdict_with_what_they_need(
    varflow: Command, done: dict[str, Any], changes: dict[str, str], needed: set[str], not_needed: set[str]
) -> None:
    told = varflow.ask("run", "smoke", *small(**changes))
    assert told["verdict"] in {"PROMOTE", "HOLD", "REJECT"}
    titles = [row["title"] for row in told["steps"]]
    stored = {title.removesuffix(" · preferences") for title in titles[: titles.index("train")]}
    assert needed <= stored and not stored & not_needed
    kept = {row["title"] for row in told["steps"] if row["cached"]}
    assert kept >= {"mirror", "ingest", "generate · champion", "score_reference"}
