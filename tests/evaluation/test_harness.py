"""The harness on a tiny random policy and invented rows: what is sent, what is scored, what is refused."""

import json
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, LlamaForCausalLM

from evaluation.config import BenchmarkConfig
from evaluation.harness.mirror import build_mirror
from evaluation.harness.run import HARNESS_VERSION
from evaluation.harness.sandbox import Outcome, SandboxedCodeEval
from tests.evaluation.evaluated import GSM8K, MMLU, run
from training.config import Device, Precision, Runtime
from training.job import Interrupted

HUMANEVAL = BenchmarkConfig(
    name="humaneval_part", tasks=("humaneval",), metric="pass@1", filter="create_test", max_gen_toks=3, max_length=1024
)
BBH = BenchmarkConfig(
    name="bbh_part",
    tasks=("bbh_cot_fewshot_boolean_expressions", "bbh_cot_fewshot_navigate"),
    metric="exact_match",
    filter="get-answer",
    max_gen_toks=4,
    max_length=1024,
)


@pytest.fixture
def with_tokenizer(tiny_policy: Path, tmp_path: Path) -> Any:
    """Return a function that copies the tiny policy and changes the copy's tokenizer."""

    def change(edit: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_policy, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        edit(tokenizer)
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
        return folder

    return change


def test_multiple_choice_is_pooled_by_items(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    result = run(tiny_policy, mirror, MMLU, folder=tmp_path)
    assert [s["task"] for s in result.samples] == ["mmlu_anatomy"] * 6 + ["mmlu_virology"] * 4
    correct = {task: [s["correct"] for s in result.samples if s["task"] == task] for task in MMLU.tasks}
    for task, values in correct.items():
        row = result.row(task)
        mean = sum(values) / len(values)
        assert (row["value"], row["n"], row["decides"]) == (mean, len(values), False)
        assert row["stderr"] == pytest.approx((mean * (1 - mean) / (len(values) - 1)) ** 0.5, abs=1e-15)
    pooled = result.row("mmlu_part")
    a, b = result.row("mmlu_anatomy"), result.row("mmlu_virology")
    assert pooled["value"] == pytest.approx((6 * a["value"] + 4 * b["value"]) / 10, abs=1e-15)
    assert pooled["stderr"] == pytest.approx(((30 * a["stderr"] ** 2 + 12 * b["stderr"] ** 2) / 8 / 10) ** 0.5)
    assert pooled == {
        "benchmark": "mmlu_part",
        "task": "mmlu_part",
        "metric": "acc",
        "filter": "none",
        "value": pooled["value"],
        "stderr": pooled["stderr"],
        "n": 10,
        "task_version": a["task_version"],
        "num_fewshot": 0,
        "decides": True,
        "harness_version": HARNESS_VERSION,
    }
    assert [r["task"] for r in result.rows if r["decides"]] == ["mmlu_part"]
    first = result.samples[0]
    assert first["prompt"].endswith("What is 3 plus 4,\nin numbers?\nA. 3\nB. 4\nC. 7\nD. 62\nAnswer:")
    assert first["choices"] == 4 and first["answer"] in "ABCD"
    assert first["correct"] == float(first["answer"] == "C")
    assert (result.progress[0]["step"], result.progress[-1]["step"], result.progress[-1]["total"]) == (0, 40, 40)


def test_the_answer_is_the_choice_with_the_largest_log_probability(
    tiny_policy: Path, mirror: Path, tmp_path: Path
) -> None:
    result = run(tiny_policy, mirror, MMLU.model_copy(update={"limit": 2}), folder=tmp_path)
    model = LlamaForCausalLM.from_pretrained(tiny_policy)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    letters = [tokenizer(f" {letter}")["input_ids"] for letter in "ABCD"]
    assert len(result.samples) == 4
    for sample in result.samples:
        head = "The following are multiple choice questions (with answers) about "
        assert sample["prompt"].startswith(head), "the whole prompt is in its tail"
        prompt = tokenizer(sample["prompt"])["input_ids"]
        scores = []
        for letter in letters:
            with torch.no_grad():
                logp_TV = model(torch.tensor([prompt + letter])).logits[0].log_softmax(dim=-1)
            places = range(len(prompt) - 1, len(prompt) + len(letter) - 1)
            scores.append(sum(float(logp_TV[at, i]) for at, i in zip(places, letter, strict=True)))
        assert sample["answer"] == "ABCD"[max(range(4), key=scores.__getitem__)]


def test_both_filters_of_gsm8k_are_logged_and_one_decides(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    result = run(tiny_policy, mirror, GSM8K, folder=tmp_path)
    assert {(r["filter"], r["decides"]) for r in result.rows} == {("strict-match", True), ("flexible-extract", False)}
    assert all(r["n"] == 6 and r["num_fewshot"] == 2 for r in result.rows)
    assert len(result.samples) == 6
    assert all(s["prompt"].count("Question:") == 3 and s["choices"] is None for s in result.samples)
    assert all(s["target"].startswith("She has <<") for s in result.samples)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    assert all(len(tokenizer(s["answer"])["input_ids"]) <= 2 * 12 for s in result.samples), "the answer cap"
    assert result.profile["tasks"]["gsm8k"]["generation"]["max_gen_toks"] == 12


def test_the_few_shot_seed_draws_the_examples(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    def prompts(seed: int, folder: str) -> list[str]:
        config = GSM8K.model_copy(update={"seed": seed, "limit": 3})
        return [s["prompt"] for s in run(tiny_policy, mirror, config, folder=tmp_path / folder).samples]

    assert prompts(1, "a") == prompts(1, "b") != prompts(2, "c")


def test_humaneval_programs_pass_by_their_tests_alone(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    result = run(tiny_policy, mirror, HUMANEVAL, folder=tmp_path)
    assert [s["ending"] for s in result.samples] == ["passed", "exception"]
    assert [s["reason"].partition(":")[0] for s in result.samples] == ["passed", "SyntaxError"]
    assert [s["correct"] for s in result.samples] == [1.0, 0.0]  # a comment's end passes, noise for a body does not
    (row,) = result.rows
    assert (row["metric"], row["filter"], row["value"], row["n"]) == ("pass@1", "create_test", 0.5, 2)
    assert row["decides"]


def test_a_metric_loaded_earlier_is_never_used(
    tiny_policy: Path, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tiny_policy, mirror, HUMANEVAL, folder=tmp_path / "a").row("humaneval", "create_test")["value"] == 0.5
    kept = sys.modules["lm_eval.tasks.humaneval.utils"]
    monkeypatch.setattr(kept, "compute_", None)  # as another's, which would run programs in this process
    assert run(tiny_policy, mirror, HUMANEVAL, folder=tmp_path / "b").row("humaneval", "create_test")["value"] == 0.5
    assert sys.modules["lm_eval.tasks.humaneval.utils"] is not kept


def test_code_eval_is_the_sandbox() -> None:
    tests = ["assert add(2, 3) == 5", "assert add(2, 3) == 5"]
    programs = [["def add(a, b): return a + b"], ["import os\nos._exit(0)"]]
    kept: dict[tuple[str, str], Outcome] = {}
    code_eval = SandboxedCodeEval(seconds=10.0, outcomes=kept)
    value, outcomes = code_eval.compute(references=tests, predictions=programs, k=[1])
    assert list(kept.values()) == outcomes and next(iter(kept)) == (programs[0][0], tests[0])
    assert value == {"pass@1": 0.5}
    assert [o.passed for o in outcomes] == [True, False]


def test_bbh_keeps_its_own_shots_and_counts_cut_prompts(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    result = run(tiny_policy, mirror, BBH, folder=tmp_path)
    assert result.row("bbh_part", "get-answer")["n"] == 5
    assert result.row("bbh_part", "get-answer")["num_fewshot"] == 3
    assert all(not s["extracted"] for s in result.samples), "a random model never says 'the answer is'"
    assert result.profile["truncated_prompts"] == 5  # 384 pieces make long prompts, and this model has 1,024 places


def test_the_profile_holds_what_scores_must_share(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    config = MMLU.model_copy(update={"chat_template": True, "system_prompt": "Be brief.", "limit": 1})
    profile = run(tiny_policy, mirror, config, folder=tmp_path).profile
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    assert profile["config"] == config.model_dump(mode="json", exclude={"endpoint"})
    assert profile["dtype"] == "float32" and profile["batch_size"] is None
    assert profile["template_sha256"] is not None and profile["multiturn"]
    assert profile["bos"]["count"] == 1
    assert len(profile["probe"]["first"]) == 16 and len(profile["probe"]["last"]) == 8
    sent = tokenizer.decode(profile["probe"]["first"])
    assert sent.startswith("<s><|im_start|>system\nBe brief.")
    assert profile["tasks"]["mmlu_anatomy"]["items"] == 1
    plain = run(
        tiny_policy, mirror, config.model_copy(update={"chat_template": False, "system_prompt": None}), folder=tmp_path
    )
    assert plain.profile["template_sha256"] is None


def test_runtime_moves_no_number_and_no_profile(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    one = run(
        tiny_policy,
        mirror,
        GSM8K,
        folder=tmp_path / "a",
        runtime=Runtime(device=Device.cpu).model_copy(update={"microbatch_tokens": 1}),
    )
    eight = run(tiny_policy, mirror, GSM8K, folder=tmp_path / "b")
    assert one.rows == eight.rows
    assert one.profile == eight.profile
    assert [s["correct"] for s in one.samples] == [s["correct"] for s in eight.samples]


def test_changed_data_at_the_same_path_is_read_anew(
    tiny_policy: Path, raw_benchmarks: Path, mirror: Path, tmp_path: Path
) -> None:
    first = run(tiny_policy, mirror, GSM8K, folder=tmp_path)
    path = raw_benchmarks / "gsm8k" / "test.jsonl"
    path.write_text(path.read_text().replace("Ann", "Eve"))
    build_mirror(raw_benchmarks, mirror)
    second = run(tiny_policy, mirror, GSM8K, folder=tmp_path)
    assert "Ann has 3 and" in first.samples[0]["prompt"].rpartition("Question:")[2]
    assert "Eve has 3 and" in second.samples[0]["prompt"].rpartition("Question:")[2]


def test_no_socket_is_opened(tiny_policy: Path, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError(f"a connection to {address[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for config in (MMLU, GSM8K, HUMANEVAL):
        assert run(tiny_policy, mirror, config, folder=tmp_path / config.name).rows


def test_a_model_that_says_nothing_scores_zero(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(tiny_policy, silent)
    model = LlamaForCausalLM.from_pretrained(silent)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are equal, and greedy search takes id 0, which is no text
    model.save_pretrained(silent)
    for config in (GSM8K, HUMANEVAL, MMLU):
        result = run(silent, mirror, config, folder=tmp_path / config.name)
        assert len(result.samples) > 0
    assert {s["answer"] for s in run(silent, mirror, GSM8K, folder=tmp_path / "again").samples} == {""}


def test_a_stop_request_ends_it_before_the_next_forward_pass(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        run(tiny_policy, mirror, GSM8K, folder=tmp_path, stop=stop)
    assert not (tmp_path / "output" / "samples.jsonl").exists()


class StopAfter(threading.Event):
    """A stop request that comes after so many looks at it."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("config", [MMLU, GSM8K], ids=["choices", "generation"])
def test_a_stopped_benchmark_goes_on_from_the_last_batch(
    tiny_policy: Path, mirror: Path, tmp_path: Path, config: BenchmarkConfig
) -> None:
    runtime = Runtime(device=Device.cpu).model_copy(update={"microbatch_tokens": 512})  # batches of two
    whole = run(tiny_policy, mirror, config, folder=tmp_path / "whole", runtime=runtime)
    passes = 1_000_000
    counted = StopAfter(passes)
    run(tiny_policy, mirror, config, folder=tmp_path / "counted", runtime=runtime, stop=counted)
    passes -= counted.looks
    with pytest.raises(Interrupted):
        run(tiny_policy, mirror, config, folder=tmp_path / "cut", runtime=runtime, stop=StopAfter(passes // 2))
    rest = StopAfter(1_000_000)
    resumed = run(tiny_policy, mirror, config, folder=tmp_path / "cut", runtime=runtime, stop=rest)
    assert 1_000_000 - rest.looks < passes, "what was answered is not computed again"
    assert resumed.rows == whole.rows and resumed.samples == whole.samples and resumed.profile == whole.profile
    assert resumed.progress[-1]["step"] == resumed.progress[-1]["total"]


def test_swapped_weights_at_the_same_path_are_evaluated_anew(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(tiny_policy, policy)
    first = run(policy, mirror, GSM8K, folder=tmp_path)
    model = LlamaForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        model.model.norm.weight.neg_()
    model.save_pretrained(policy)
    second = run(policy, mirror, GSM8K, folder=tmp_path)
    assert [s["answer"] for s in first.samples] != [s["answer"] for s in second.samples]
    assert first.profile["model"] != second.profile["model"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MMLU.model_copy(update={"tasks": ("mmlu_anatomie",)}),
            r"has no task or group of this name \(nearest: mmlu_anatomy",
        ),
        (GSM8K.model_copy(update={"filter": "strict"}), r"no filter 'strict', expected one of strict-match, flexible"),
        (GSM8K.model_copy(update={"metric": "acc"}), r"no metric 'acc', expected one of exact_match"),
        (HUMANEVAL.model_copy(update={"metric": "pass@10"}), r"no metric 'pass@10', expected one of pass@1;"),
        (HUMANEVAL.model_copy(update={"num_fewshot": 3}), r"humaneval takes 0 shots and no other number, got 3"),
        (MMLU.model_copy(update={"max_length": 4096}), r"max_length is 4096, but the model .* has 1024 positions"),
        (MMLU.model_copy(update={"system_prompt": "Hi"}), r"a system prompt without the chat template"),
        (GSM8K.model_copy(update={"max_gen_toks": 1024}), r"leaves no room for a prompt"),
        (GSM8K.model_copy(update={"limit": 7}), r"the item limit is 7, but its largest task has 6 items"),
    ],
    ids=["task", "filter", "metric", "pass@10", "shots", "length", "system prompt", "cap", "limit"],
)
def test_settings_that_cannot_be_met_are_refused(
    tiny_policy: Path, mirror: Path, tmp_path: Path, config: BenchmarkConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_policy, mirror, config, folder=tmp_path)


def test_a_chat_benchmark_needs_a_template(with_tokenizer: Any, mirror: Path, tmp_path: Path) -> None:
    def forget(tokenizer: Any) -> None:
        tokenizer.chat_template = None

    with pytest.raises(ValueError, match=r"asks for the chat template, but the tokenizer of .* has none"):
        run(with_tokenizer(forget), mirror, MMLU.model_copy(update={"chat_template": True}), folder=tmp_path)


@pytest.mark.parametrize("config", [MMLU, GSM8K], ids=["choices", "generation"])
def test_a_doubled_bos_is_refused_by_the_ids_sent(
    with_tokenizer: Any, mirror: Path, tmp_path: Path, config: BenchmarkConfig
) -> None:
    def add_bos(count: int) -> Any:
        def edit(tokenizer: Any) -> None:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=" ".join(["<s>"] * count + ["$A"]), special_tokens=[("<s>", tokenizer.bos_token_id)]
            )

        return edit

    doubled = with_tokenizer(add_bos(2))
    with pytest.raises(ValueError, match=r"begins with two BOS tokens \(id 0\): the first ids sent are \[0, 0, "):
        run(doubled, mirror, config, folder=tmp_path)
    shutil.rmtree(doubled)
    assert run(with_tokenizer(add_bos(1)), mirror, config, folder=tmp_path).profile["bos"]["count"] == 1


def test_a_folder_without_weights_is_refused(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    hollow = tmp_path / "hollow"
    shutil.copytree(tiny_policy, hollow, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="no weights"):
        run(hollow, mirror, MMLU, folder=tmp_path)


def test_half_precision_makes_the_batch_part_of_the_profile(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    config = MMLU.model_copy(update={"precision": Precision.bfloat16, "limit": 1})
    profile = run(tiny_policy, mirror, config, folder=tmp_path).profile
    assert (profile["dtype"], profile["batch_size"]) == ("bfloat16", 8)
    assert profile["prefix_sharing"] == [True, True]
    assert (profile["machine"], profile["config"]["batch_size"]) == ({"device": "cpu"}, 8)


def test_answers_in_half_precision_are_taken_up_only_at_their_batch_size(
    tiny_policy: Path, mirror: Path, tmp_path: Path
) -> None:
    config = MMLU.model_copy(update={"precision": Precision.bfloat16})
    two, eight = (Runtime(device=Device.cpu).model_copy(update={"microbatch_tokens": tokens}) for tokens in (512, 2048))
    passes = 1_000_000
    with pytest.raises(Interrupted):
        run(tiny_policy, mirror, config, folder=tmp_path, runtime=two, stop=StopAfter(3))
    whole, resumed = StopAfter(passes), StopAfter(passes)
    run(tiny_policy, mirror, config, folder=tmp_path / "whole", runtime=eight, stop=whole)
    assert len((tmp_path / "work/responses.jsonl").read_text().splitlines()) > 1, "there was something to take up"
    run(tiny_policy, mirror, config, folder=tmp_path, runtime=eight, stop=resumed)
    assert resumed.looks == whole.looks, "and nothing was"


def test_prompts_that_were_cut_are_counted_after_a_kill_too(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    config = MMLU.model_copy(update={"max_length": 64})
    runtime = Runtime(device=Device.cpu).model_copy(update={"microbatch_tokens": 512})
    with pytest.raises(Interrupted):
        run(tiny_policy, mirror, config, folder=tmp_path / "cut", runtime=runtime, stop=StopAfter(3))
    resumed = run(tiny_policy, mirror, config, folder=tmp_path / "cut", runtime=runtime)
    whole = run(tiny_policy, mirror, config, folder=tmp_path / "whole", runtime=runtime)
    assert resumed.profile["truncated_prompts"] == whole.profile["truncated_prompts"] > 0
    assert resumed.samples == whole.samples


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_s_own_generation_settings_stand_in_the_profile(
    tiny_policy: Path, mirror: Path, tmp_path: Path, workers: int
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(tiny_policy, policy)
    path = policy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.5, "temperature": 0.7}))
    config, runtime = (
        GSM8K.model_copy(update={"limit": 2}),
        Runtime(device=Device.cpu).model_copy(update={"workers": workers}),
    )
    plain = run(tiny_policy, mirror, config, folder=tmp_path / "plain").profile["generation_config"]
    found = run(policy, mirror, config, folder=tmp_path / "own", runtime=runtime).profile["generation_config"]
    assert found == plain | {"repetition_penalty": 1.5}
    assert run(policy, mirror, MMLU, folder=tmp_path / "choices").profile["generation_config"] is None
