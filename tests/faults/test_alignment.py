"""Evaluations by reward model, by the command on a real stack: figures, identity, refusals, a kill, the report."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking.client import MlflowClient

from evaluation.judges.sets import LLMBAR_SUBSETS
from infra.settings import Settings
from infra.store import Store
from tasks.artifacts import fetch_artifact
from tests.evaluation.chat_server import ChatServer, prefer_longer
from tests.faults.command import (
    Command,
    await_child,
    await_no_children,
    killed_at_the_end,
    record_of,
    small,
    words_of,
)
from tests.tasks.maker import BASE, Maker

DEMO = Path(__file__).resolve().parents[2] / "flows" / "demo" / "benchmarks"
ANSWERS = {"suite.alignment.answers.max_new_tokens": 6, "runtime.threads": 1, "scoring.max_tokens": 64}
MODELS = ("demo:tiny-policy", "--reward", "demo:tiny-reward-model")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a few invented rows of every set in the format of its repository."""
    folder = tmp_path_factory.mktemp("alignment")

    def write(name: str, text: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    for split in ("helpful", "harmless"):
        asked = [f"\n\nHuman: Is {n} {split}?\n\nAssistant:" for n in range(12)]
        rows = [json.dumps({"chosen": f"{ask} Yes.", "rejected": f"{ask} No."}) for ask in asked]
        write(f"hh-rlhf/{split}-base/test.jsonl", "\n".join(rows))
    instructions = [f"Say {n} in a word." for n in range(6)]
    rows = [json.dumps({"instruction": i, "output_1": "One.", "output_2": "A word.", "label": 2}) for i in instructions]
    write("offsetbias/train.jsonl", "\n".join(rows))
    bias = {"instruction": "Add 1 and 1.", "response1": "2", "response2": "It may well be 3.", "label": 1}
    biases = {
        name: [{"bias": name, **bias, "instruction": f"Add {n}, {name}."} for n in range(4)]
        for name in ("length bias", "concreteness")
    }
    write("evalbiasbench/biasbench.json", json.dumps(biases))
    for subset in LLMBAR_SUBSETS:
        bar = [
            {"input": f"{subset} {n}?", "output_1": "A long answer.", "output_2": "Yes.", "label": 2} for n in range(3)
        ]
        write(f"llmbar/{subset}/dataset.json", json.dumps(bar))
    return folder


def test_a_policy_against_itself_and_again_for_nothing(varflow: Command, stack: Settings, files: Path) -> None:
    words = ("benchmark", *MODELS, "--baseline", "demo:tiny-policy", "--files", str(files), "--profile", "alignment")
    told = varflow.ask(*words, *words_of(ANSWERS))
    scores = told["scores"]
    for name, n in (("hha_helpful", 12), ("hha_harmless", 12), ("offsetbias", 6)):
        assert (scores[f"eval/{name}/n"], scores[f"eval/{name}/reward_gain"], scores[f"eval/{name}/win_rate"]) == (
            n,
            0,
            0.5,
        )
        assert scores[f"eval/{name}/reward"] == scores[f"eval/{name}/reward_baseline"]
        assert scores[f"eval/{name}/win_rate_low"] < 0.5 < scores[f"eval/{name}/win_rate_high"]
    run = MlflowClient(stack.mlflow_tracking_uri).get_run(told["mlflow_run"].partition("/runs/")[2].partition("?")[0])
    assert {k: run.data.metrics[k] for k in scores} == scores
    assert "hha_helpful/reward/mean" in run.data.metrics and "reward/mean" not in run.data.metrics
    answered = [step for step in told["steps"] if step["step"] == "generate"]
    assert (
        len({step["fingerprint"] for step in answered}) == 3
    )  # the model is its own baseline: each set is answered once
    again = varflow.ask(*words, *words_of(ANSWERS))
    assert all(step["cached"] for step in again["steps"]) and again["scores"] == scores


def test_a_part_of_one_model_alone(varflow: Command, files: Path) -> None:
    words = ("benchmark", *MODELS, "--files", str(files), "--profile", "hha", "--limit", "3")
    told = varflow.ask(*words, *words_of(ANSWERS))
    assert {name.split("/")[1] for name in told["scores"]} == {"hha_helpful_part", "hha_harmless_part"}
    assert told["scores"]["eval/hha_helpful_part/n"] == 3 and "eval/hha_helpful_part/win_rate" not in told["scores"]
    assert told["flags"]["hha_helpful_part"].startswith(
        "limit: "
    )  # of a random model no answer of 6 tokens ends by itself
    asked = varflow.ask(*words, *words_of(ANSWERS | {"scoring.max_tokens": 63, "runtime.microbatch_tokens": 256}))
    assert {step["step"] for step in asked["steps"] if not step["cached"]} == {"score_rewards", "alignment"}


def test_two_models_side_by_side_by_their_rewards(varflow: Command, files: Path, done: dict[str, Any]) -> None:
    trained = next(f"train/{step['fingerprint']}" for step in done["steps"] if step["step"] == "train")
    asked = ("--reward", "demo:tiny-reward-model", "--files", str(files), "--profile", "hha", "--limit", "5")
    told = [varflow.ask("benchmark", model, *asked, *words_of(ANSWERS)) for model in ("demo:tiny-policy", trained)]
    runs = [each["mlflow_run"].partition("/runs/")[2].partition("?")[0] for each in told]
    found = varflow.ask("compare", *runs, "--no-tokens")["comparison"]
    measured = {measure["what"]: measure for measure in found["alignment"]}
    assert measured.keys() == {"hha_helpful_part", "hha_harmless_part"} and found["benchmarks"] == []
    for name, measure in measured.items():
        levels = [each["scores"][f"eval/{name}/reward"] for each in told]
        assert [level["value"] for level in measure["levels"]] == pytest.approx(levels)
        assert measure["differences"][0]["difference"] == pytest.approx(levels[1] - levels[0])
    shown = varflow.run("compare", *runs, "--no-tokens")
    assert shown.returncode == 0 and "hha_helpful_part (5)" in shown.stdout
    base, ours = (
        next(f"generate/{step['fingerprint']}" for step in each["steps"] if "hha_helpful_part" in step["title"] and step["step"] == "generate")
        for each in told
    )  # fmt: skip
    with ChatServer(prefer_longer) as server:
        address = {"VARFLOW_JUDGE_URL": server.url, "VARFLOW_JUDGE_API_KEY": "key"}
        words = ("judge", "heldout", ours, "--against", base, "--judge", "endpoint:judge@2026")
        judged = varflow.ask(*words, **address)
    assert (
        judged["benchmarks"].keys() == {"hha_helpful_part"} and judged["benchmarks"]["hha_helpful_part"]["items"] == 5
    )
    assert 0 <= judged["scores"]["eval/hha_helpful_part/win_rate"] <= 1


def test_a_reward_model_is_tested_and_keeps_its_name(
    varflow: Command, store: Store, stack: Settings, files: Path
) -> None:
    words = ("benchmark", "demo:tiny-reward-model", "--files", str(files), "--profile", "reward_bias")
    told = varflow.ask(*words, *words_of({"scoring.max_tokens": 64, "runtime.threads": 1}))
    scores = told["scores"]
    assert (scores["eval/evalbiasbench/n"], scores["eval/llmbar/n"]) == (8, 15)
    assert {"eval/evalbiasbench/length_bias/accuracy", "eval/llmbar/adversarial_gptinst/accuracy"} <= scores.keys()
    assert scores["eval/evalbiasbench/longer_preferred"] == pytest.approx(1 - scores["eval/evalbiasbench/accuracy"])
    tested = record_of(store, told, "reward_bias")
    scored = record_of(store, told, "score_rewards")
    assert tested.inputs["scores"] == scored.fingerprint and scored.given["scorer"].name == "demo:tiny-reward-model"
    page = json.loads((fetch_artifact(store, tested, home=stack.home) / "reward_bias.json").read_text())
    assert page["overall"]["accuracy"] == scores["eval/llmbar/accuracy"]
    shown = varflow.run(*words, *words_of({"scoring.max_tokens": 64, "runtime.threads": 1}))
    assert "eval/evalbiasbench/accuracy" in shown.stdout and "all 6 steps cached" in shown.stdout


def test_the_real_sets_are_evaluated(varflow: Command, real_data: Path) -> None:
    scoring = words_of({"scoring.max_tokens": 64, "runtime.threads": 1})
    words = ("benchmark", "demo:tiny-reward-model", "--files", str(real_data), "--profile", "reward_bias")
    scores = varflow.ask(*words, *scoring)["scores"]
    assert (scores["eval/evalbiasbench/n"], scores["eval/llmbar/n"]) == (80, 419)
    assert scores["eval/evalbiasbench/length_bias/accuracy"] <= 1 and 0.3 < scores["eval/llmbar/accuracy"] < 0.7
    told = varflow.ask(
        "benchmark", *MODELS, "--baseline", "demo:tiny-policy", "--files", str(real_data), "--profile", "hha", "--limit", "12",
        *words_of(ANSWERS),
    )  # fmt: skip
    assert 2 <= told["scores"]["eval/hha_helpful_part/n"] <= 12 and "eval/hha_harmless_part/reward" in told["scores"]
    assert told["scores"]["eval/hha_helpful_part/win_rate"] == 0.5


def test_what_cannot_be_evaluated_is_refused_in_words(varflow: Command, files: Path, tmp_path: Path) -> None:
    words = ("benchmark", *MODELS, "--profile", "alignment")
    told = varflow.refuse(*words, "--files", str(files / "hh-rlhf"))
    assert "3 of 3 sets have no folder" in told and "offsetbias: offsetbias" in told
    told = varflow.refuse(*words, "--files", str(files), "--limit", "7")
    assert "offsetbias" in told and "got the limit 7, there are 6" in told
    reward = ("benchmark", "demo:tiny-reward-model", "--profile", "reward_bias", "--files", str(files))
    told = varflow.refuse(*reward, "--set", "scoring.render=chat_template", "--set", "scoring.max_tokens=64")
    assert "got no chat template, which render=chat_template needs" in told


def test_a_reward_model_of_the_store_is_asked_as_it_was_trained(
    varflow: Command, store: Store, files: Path, tmp_path: Path
) -> None:
    files_of_it = {"config.json": "{}", "model.safetensors": ""}
    made = Maker(store, tmp_path).make("reward_model", {"base": BASE}, files_of_it, config={"render": "chat_template"})
    reward = f"reward_model/{made.fingerprint}"
    told = varflow.refuse(
        "benchmark", "demo:tiny-policy", "--profile", "hha", "--files", str(files), "--reward", reward
    )
    assert f"{reward}: was trained with render chat_template, and is to be asked with text_pair" in told


@pytest.mark.slow
def test_killed_while_answering_then_finished(varflow: Command, stack: Settings, files: Path) -> None:
    words = ("benchmark", *MODELS, "--files", str(files), "--profile", "hha", "--limit", "11")
    changes = words_of(ANSWERS | {"suite.alignment.answers.max_new_tokens": 400, "suite.alignment.answers.seed": 9})
    with killed_at_the_end(varflow.start(*words, *changes)) as flow:
        await_child(flow, stack.home, "generate")
        flow.kill()
        flow.communicate()
    await_no_children(stack.home)
    told = varflow.ask(*words, *changes)
    cached = {step["step"]: step["cached"] for step in told["steps"]}
    assert cached["prompt_set"] and not cached["generate"]
    assert told["scores"]["eval/hha_helpful_part/n"] == 11


def test_a_recipe_that_asks_shows_it_in_its_report(
    varflow: Command, store: Store, stack: Settings, files: Path, done: dict[str, Any]
) -> None:
    alignment = {
        "prompt_sets": [{"name": "hha_helpful", "limit": 8}],
        "answers": {"max_new_tokens": 6, "temperature": 0.0},
        "pair_sets": [{"name": "evalbiasbench"}],
    }
    folder = files.parent / f"{files.name}-all"
    folder.mkdir()
    for below in (*DEMO.iterdir(), *files.iterdir()):
        (folder / below.name).symlink_to(below)
    told = varflow.ask("run", "smoke", *small(name="aligned", benchmarks=str(folder), suite__alignment=alignment))
    kinds = [step["step"] for step in told["steps"]]
    assert kinds.index("prompt_set") < kinds.index("train") < kinds.index("alignment") < kinds.index("gate")
    page = Path(told["report"]).read_text()
    assert 'data-chart="alignment_gains"' in page and 'data-chart="reward_tests"' in page and "hha_helpful_part" in page
    run = MlflowClient(stack.mlflow_tracking_uri).get_run(told["mlflow_run"].partition("/runs/")[2].partition("?")[0])
    assert {"eval/hha_helpful_part/win_rate", "eval/evalbiasbench/accuracy"} <= run.data.metrics.keys()
    assert run.data.metrics["reward/mean"] == record_of(store, done, "score_rewards").summary["metrics"]["reward/mean"]
    trained = record_of(store, told, "train")
    compared = varflow.ask("compare", "demo:tiny-policy", f"train/{trained.fingerprint}")["comparison"]
    assert compared["reward"]["n"] == 4  # the held-out prompts, not those of a set
