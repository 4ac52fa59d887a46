"""Identity of a plan: what changes a fingerprint, what does not, and how far a change reaches. Nothing runs here."""

import json
import os
import shutil
from pathlib import Path

import pytest

from evaluation import suites
from evaluation.suites import paper, place_suite
from flows import recipes
from flows.align import plan_align
from flows.benchmark import plan_benchmark
from flows.config import AlignConfig, BenchmarkFlowConfig, TrainedReward
from flows.overrides import override
from flows.recipes import RECIPES, smoke
from infra.settings import Settings, read_settings
from infra.store import Store
from tasks.noise import choose_noise
from tasks.sources import DEMO
from training.config import Device, Runtime
from training.objectives.dpo import DpoConfig
from training.objectives.sft import SftConfig

NOWHERE = Store(bucket="nowhere", endpoint="http://127.0.0.1:9", access_key="none", secret_key="none")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return read_settings(home=tmp_path / "home")


def fingerprints(config: AlignConfig, settings: Settings) -> dict[str, str]:
    """Return title -> fingerprint of every step of a plan, made without any server."""
    steps = plan_align(config, store=NOWHERE, settings=settings).steps()
    return {step.title: step.fingerprint for step in steps}


def changed(config: AlignConfig, settings: Settings, *changes: str) -> set[str]:
    before, after = fingerprints(config, settings), fingerprints(override(config, changes), settings)
    assert before.keys() == after.keys()
    return {title for title in before if before[title] != after[title]}


def test_the_plan_is_the_same_each_time_and_names_each_step_once(settings: Settings) -> None:
    plan = fingerprints(smoke(), settings)
    assert plan == fingerprints(smoke(), settings)
    assert len(set(plan.values())) == len(plan)
    assert list(plan)[:2] == ["mirror", "ingest"] and list(plan)[-2:] == ["gate", "report"]


def test_lambda_changes_training_and_what_follows_and_nothing_else(settings: Settings) -> None:
    after = changed(smoke(), settings, "train.lambda_=0.25")
    assert after == {
        "train", "generate · challenger", "score_rewards · challenger", "evaluate · mmlu_part challenger",
        "evaluate · gsm8k_part challenger", "gate", "report",
    }  # fmt: skip


def test_the_gates_margins_change_the_verdict_alone(settings: Settings) -> None:
    assert changed(smoke(), settings, "gate.alpha=0.01") == {"gate", "report"}


@pytest.mark.parametrize(
    "change",
    [
        "approval=true",
        "runtime.device=cpu",
        "runtime.microbatch_tokens=64",
        "runtime.threads=2",
        "runtime.checkpoint_every_steps=7",
    ],
)
def test_runtime_is_no_identity(settings: Settings, change: str) -> None:
    assert changed(smoke(), settings, change) == set()


def test_every_field_but_runtime_and_names_is_identity(settings: Settings) -> None:
    config = smoke()
    for path in (
        "ingest.heldout_fraction=0.3", "reward.scoring.max_tokens=65", "reference.max_tokens=300", "train.seed=5",
        "heldout.seed=5", "suite.benchmarks.0.seed=5", "gate.targets.heldout_reward=0.5",
    ):  # fmt: skip
        assert changed(config, settings, path), path


def test_where_a_source_lies_is_no_identity_and_what_it_holds_is(settings: Settings, tmp_path: Path) -> None:
    demo = Path(recipes.__file__).parent / "demo" / "preferences.jsonl"
    copy = tmp_path / "elsewhere" / "preferences.jsonl"
    copy.parent.mkdir()
    shutil.copy(demo, copy)
    config = smoke().model_copy(update={"preferences": str(copy)})
    assert fingerprints(config, settings) == fingerprints(smoke(), settings)
    with copy.open("a") as file:
        file.write('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    assert "ingest" in {t for t, f in fingerprints(config, settings).items() if f != fingerprints(smoke(), settings)[t]}


def test_sft_needs_no_scores_of_the_stored_responses(settings: Settings) -> None:
    plan = fingerprints(smoke().model_copy(update={"train": SftConfig()}), settings)
    assert "score_reference" not in plan and "score_rewards · preferences" not in plan


def test_dpo_needs_the_reference_of_the_stored_responses_and_no_rewards_of_them(settings: Settings) -> None:
    plan = fingerprints(override(smoke(), ["train.objective=dpo"]), settings)
    assert "score_reference" in plan and "score_rewards · preferences" not in plan
    assert list(plan).index("score_reference") < list(plan).index("train")
    after = changed(override(smoke(), ["train.objective=dpo"]), settings, "train.beta=0.3")
    assert "train" in after and "score_reference" not in after


def test_cross_batch_scores_the_batches_of_its_training(settings: Settings) -> None:
    config = override(smoke(), ["train.normaliser=cross_batch"])
    plan = list(fingerprints(config, settings))
    assert plan.index("score_reference") < plan.index("score_cross") < plan.index("train")
    assert {"score_cross", "train"} <= changed(config, settings, "train.seed=5")
    assert "score_cross" not in changed(config, settings, "train.lambda_=0.25")


def test_another_objective_keeps_what_both_know_and_takes_its_own_defaults() -> None:
    config = override(smoke(), ["train.objective=dpo", "train.beta=0.3"])
    assert config.train == DpoConfig(beta=0.3, batch_prompts=8, max_tokens=512)
    assert override(config, ["train.objective=sft"]).train == SftConfig(batch_prompts=8, max_tokens=512)
    back = override(config, ["train.objective=var", "train.reference_factor=mean"])
    assert back == smoke()
    with pytest.raises(
        ValueError, match=r"train\.var\.reference_factor: Input should be 'sum', 'mean' or 'none'; got None"
    ):
        override(config, ["train.objective=var"])
    with pytest.raises(ValueError, match=r"train: Input tag 'ppo' found using 'objective' does not match .*'dpo'"):
        override(config, ["train.objective=ppo"])
    given = override(smoke(), ["reward.kind=trained"])
    assert given.reward == TrainedReward(scoring=smoke().reward.scoring)


def test_the_form_draws_the_objectives_as_tabs() -> None:
    """Of `anyOf` Prefect's form makes tabs, each with its member's title, fields and defaults."""
    schema = AlignConfig.model_json_schema()
    train = schema["properties"]["train"]
    members = [schema["$defs"][option["$ref"].rpartition("/")[2]] for option in train["anyOf"]]
    assert [member["title"] for member in members] == ["VAR", "SFT", "DPO"]
    assert not {"oneOf", "discriminator", "default"} & train.keys()
    for member in members:
        assert all({"title", "type"} & field.keys() or "$ref" in field for field in member["properties"].values())
        assert not {"columns"} & member["properties"].keys()
    assert members[2]["properties"]["beta"]["default"] == DpoConfig().beta


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete_and_survive_json(name: str) -> None:
    config = RECIPES[name]()
    assert AlignConfig.model_validate_json(config.model_dump_json()) == config
    assert set(config.gate.margins) == {benchmark.name for benchmark in config.suite.benchmarks}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.lamda_=1", "unknown key 'lamda_'; expected lambda_"),
        ("train.lambda_", "got no '='"),
        ("train.lambda_=-1", r"train\.var\.lambda_: Input should be greater than 0; got -1"),
        ("train.lambda_=NaN", "finite"),
        ("policy.x=1", "unknown key 'x'"),
    ],
)
def test_a_bad_override_says_what_is_expected(change: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        override(smoke(), [change])


def test_a_gate_that_names_what_the_suite_does_not_run_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(
        ValueError, match=r"does not run: margins mmlu, targets gsm8k; the suite runs mmlu_part, gsm8k_part"
    ):
        override(smoke(), ['gate.margins={"mmlu": 0.1}', 'gate.targets={"gsm8k": 0}'])


def test_the_noise_floor_is_the_champion_under_other_seeds_where_examples_are_drawn(settings: Settings) -> None:
    changes = ["noise.seeds=2", "noise.batch_sizes=[1]", "noise.workers=[2]"]
    plan = fingerprints(override(smoke(), changes), settings)
    new = plan.keys() - fingerprints(smoke(), settings).keys()
    assert new == {
        "evaluate_varied · gsm8k_part seed 1235", "evaluate_varied · gsm8k_part seed 1236",  # MMLU is asked without examples
        "evaluate_varied · mmlu_part batch 1", "evaluate_varied · gsm8k_part batch 1",
        "evaluate_varied · mmlu_part workers 2", "evaluate_varied · gsm8k_part workers 2", "noise",
    }  # fmt: skip
    assert list(plan)[-2:] == ["gate", "report"]
    varied = [plan[f"evaluate_varied · mmlu_part {how}"] for how in ("batch 1", "workers 2")]
    assert len({*varied, plan["evaluate · mmlu_part champion"]}) == 3, "what is varied is identity"
    assert fingerprints(override(smoke(), [*changes, "runtime.workers=4"]), settings) == plan, "the runtime is none"
    with pytest.raises(ValueError, match=r"noise\.workers: got 2, which is runtime\.workers, so nothing would vary"):
        fingerprints(override(smoke(), [*changes, "runtime.workers=2"]), settings)


def test_the_command_varies_workers_where_they_are_processes() -> None:
    one, four = Runtime(device=Device.cpu), Runtime(device=Device.cpu, workers=4)
    served = place_suite(paper(), backend=None, endpoint="m@http://127.0.0.1:8000/v1")
    fast = place_suite(paper(), backend="vllm", endpoint=None)
    found = [choose_noise(suite, one).workers for suite in (paper(), served, fast)]
    assert found == [(2,), (2,), ()] and choose_noise(paper(), four).workers == (1,)


def test_weights_swapped_at_the_same_path_are_evaluated_anew_whatever_their_size_and_time(
    settings: Settings, tmp_path: Path
) -> None:
    folder = shutil.copytree(DEMO / "tiny-policy", tmp_path / "policy")
    config = smoke().model_copy(update={"policy": str(folder), "champion": "base"})
    before, weights = fingerprints(config, settings), folder / "model.safetensors"
    assert fingerprints(config, settings) == before
    state, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = fingerprints(config, settings)
    same = {title for title in before if before[title] == after[title]}
    assert same == {"mirror", "ingest", "score_rewards · preferences"}, "what no policy takes part in"


@pytest.mark.parametrize("reference", ["absent/folder", "demo:absent", "hub:org/name@main", "hub:org/name"])
def test_a_source_that_is_not_there_is_refused_when_the_plan_is_made(settings: Settings, reference: str) -> None:
    with pytest.raises(ValueError, match=r"expected a path, demo:|expected a commit of 40 hex digits"):
        fingerprints(smoke().model_copy(update={"policy": reference}), settings)


@pytest.fixture
def aligned(tmp_path: Path) -> AlignConfig:
    """Return the small recipe with a prompt set and a pair set of a folder with a file in each."""
    for name in ("hh-rlhf/helpful-base/test.jsonl", "evalbiasbench/biasbench.json", "other/notes.txt"):
        (tmp_path / "files" / name).parent.mkdir(parents=True)
        (tmp_path / "files" / name).write_text("{}")
    sets = {"prompt_sets": [{"name": "hha_helpful"}], "pair_sets": [{"name": "evalbiasbench"}]}
    changes = (f"suite.alignment={json.dumps(sets)}", f"benchmarks={tmp_path / 'files'}")
    return override(smoke(), changes)


def test_evaluations_by_reward_model_come_beside_what_decides(aligned: AlignConfig, settings: Settings) -> None:
    plan = fingerprints(aligned, settings)
    without = fingerprints(override(aligned, ["suite.alignment={}"]), settings)
    assert {title for title in without if plan[title] != without[title]} == {"report"}
    assert [title for title in plan if title not in without] == [
        "prompt_set · hha_helpful", "pair_set · evalbiasbench",
        "generate · hha_helpful challenger", "score_rewards · hha_helpful challenger",
        "generate · hha_helpful champion", "score_rewards · hha_helpful champion", "score_rewards · evalbiasbench pairs",
        "alignment · hha_helpful", "reward_bias · evalbiasbench",
    ]  # fmt: skip


def test_how_answers_are_made_and_scored_is_identity_and_what_lies_beside_the_sets_is_not(
    aligned: AlignConfig, settings: Settings
) -> None:
    answers = {
        f"{step} · hha_helpful {who}" for step in ("generate", "score_rewards") for who in ("champion", "challenger")
    }
    sampled = changed(aligned, settings, "suite.alignment.answers.max_new_tokens=9")
    assert sampled == answers | {"alignment · hha_helpful", "report"}
    asked = changed(aligned, settings, "reward.scoring.max_tokens=48")
    assert {"alignment · hha_helpful", "reward_bias · evalbiasbench"} <= asked
    assert not {"prompt_set · hha_helpful", "generate · hha_helpful champion"} & asked
    before = fingerprints(aligned, settings)
    (Path(aligned.benchmarks) / "other" / "notes.txt").write_text("more")
    beside = {title for title, now in fingerprints(aligned, settings).items() if now != before[title]}
    assert (
        "mirror" in beside
        and not {"prompt_set · hha_helpful", *answers - {t for t in answers if "challenger" in t}} & beside
    )
    (Path(aligned.benchmarks) / "hh-rlhf/helpful-base/test.jsonl").write_text("{} ")
    assert fingerprints(aligned, settings)["alignment · hha_helpful"] != before["alignment · hha_helpful"]


def test_sets_that_are_not_there_are_named_before_anything_runs(aligned: AlignConfig, settings: Settings) -> None:
    sets = '[{"name": "hha_helpful"}, {"name": "hha_harmless"}, {"name": "offsetbias"}]'
    with pytest.raises(
        ValueError, match=r"2 of 4 sets have no folder at .*hha_harmless: hh-rlhf/harmless-base, offsetbias"
    ):
        fingerprints(override(aligned, [f"suite.alignment.prompt_sets={sets}"]), settings)


def test_a_reward_model_is_asked_as_it_was_trained() -> None:
    with pytest.raises(
        ValueError, match=r"got training.render chat_template and scoring.render text_pair, expected one"
    ):
        override(recipes.demo(), ["reward.training.render=chat_template"])


def test_a_suite_says_what_scores_it(settings: Settings) -> None:
    tested = BenchmarkFlowConfig(model="m", suite=suites.reward_bias())
    assert tested.scorer == "m" and BenchmarkFlowConfig(model="m", suite=suites.paper()).scorer == ""
    assert BenchmarkFlowConfig(model="m", reward="r", suite=suites.hha()).scorer == "r"
    with pytest.raises(ValueError, match="hha_helpful, hha_harmless are scored by a reward model, and none is named"):
        plan_benchmark(BenchmarkFlowConfig(model="m", suite=suites.hha()), store=NOWHERE, settings=settings)
    without_use = BenchmarkFlowConfig(model="m", baseline="b", suite=suites.paper())
    with pytest.raises(ValueError, match="baseline 'b': the suite has no prompt sets"):
        plan_benchmark(without_use, store=NOWHERE, settings=settings)
