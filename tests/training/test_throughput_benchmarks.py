"""The throughput comparisons: their whole path with TRL's own trainers on a model of two layers, and what their figures are made of."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from trl import DPOConfig, SFTConfig

from benchmarks import engine, peers, roofline, training_gpu
from benchmarks.children import MeasurementFailed
from benchmarks.engine import (
    SETTINGS,
    Lane,
    make_examples,
    make_steps,
    make_synthetic,
    open_model,
    order_pairs,
    pick_pairs,
)
from benchmarks.training import GROUP_OF, GROUPS, LONG_GROUPS, SHARED, Bench, Extent, main, plot_lengths, run_groups
from training.checkpoint import Progress
from training.config import Layout, Runtime
from training.flops import count_flops
from training.job import Job
from training.loop import Trainer, make_optimiser
from training.model import checkpoint_activations, compile_layers
from training.segments import FUSED
from training.train import PolicyForward
from training.tree import enable_trees

PREFERENCES = Path(__file__).parents[2] / "flows" / "demo" / "preferences.jsonl"
CPU = torch.device("cpu")
LAYERS, HEADS, WIDTH = 2, 4, 8  # of the tiny policy
EXTENT = Extent(steps=1, dpo_microbatches=(4, 8), sft_microbatches=(4, 8), lengths=(128, 512))


@pytest.fixture
def shared(tiny_policy: Path, tmp_path: Path) -> dict[str, Any]:
    """Return what all measurements have: the tiny policy and the rows that varflow ships, one timed step."""
    (tmp_path / "data" / "helpful-base").mkdir(parents=True)
    shutil.copy(PREFERENCES, tmp_path / "data" / "helpful-base")
    return SHARED | {"model": str(tiny_policy), "data": str(tmp_path / "data"), "steps": 1}


@pytest.fixture
def bench(shared: dict[str, Any], tmp_path: Path) -> Bench:
    """Return the throughput comparisons as small as they can be."""
    return Bench(shared, tmp_path / "scratch", talk=False, extent=EXTENT)


def test_rows_are_those_that_the_environment_names_where_none_are_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.training", "--json", "--only", "var_vs_dpo_reward_gain_ci"])
    for named, got in (("", "None"), (str(tmp_path), str(tmp_path / "hh-rlhf"))):
        monkeypatch.setenv("VARFLOW_TEST_DATA", named)
        with pytest.raises(SystemExit):
            main()
        assert f"--data: got {got}, expected the folder" in capsys.readouterr().err


def make_work(spec: dict[str, Any], lengths: list[int]) -> tuple[Any, Any]:
    """Return the tiny policy ready for trees, and VAR's steps over one pair of each length, half of them a step."""
    model = open_model(spec)[1].eval()
    enable_trees(model)
    examples = [make_synthetic(length, index, model) for index, length in enumerate(lengths)]
    return model, make_steps(spec, examples, PolicyForward(CPU, Layout.tree, count_flops(model)))


def count_attention(query: Any, key: Any, *_: Any, **options: Any) -> int:
    """Return the operations of attention's kernel, by shapes [B, heads, tokens, size]."""
    return 4 * math.prod(query) * key[2]


def test_flops_of_a_step_are_those_that_torch_counts_without_what_is_masked_or_computed_again(
    shared: dict[str, Any], cores: Any
) -> None:
    """Two trees of a micro-batch. Attention's kernel runs on a rectangle of queries and keys for each prompt and each response; of use are the
    pairs of a token and one on its way to the root."""
    cores(1)  # torch's counter does not see what other threads do
    model, work = make_work(shared, [60, 100, 60, 100])

    def count() -> tuple[int, dict[str, int]]:
        (members,) = work.cut(0, budget=10**6)
        with FlopCounterMode(display=False, custom_mapping={FUSED: count_attention}) as counter:
            part = work.part(model, work.load(0, members))
            part.loss.backward()
        done = counter.get_flop_counts()["Global"]
        return part.flops, {str(op).split(".")[1]: int(n) for op, n in done.items()}

    flops, done = count()
    rectangles = pairs = tokens = positions = 0
    for example in work.rows(0):
        prompt = example.samples[0].start
        responses = [sample.num_trained - 1 for sample in example.samples]  # the last one is not read
        rectangles += prompt**2 + sum(n * (prompt + n) for n in responses)
        pairs += sum(range(1, prompt + 1)) + sum(sum(range(prompt + 1, prompt + n + 1)) for n in responses)
        tokens += prompt + sum(responses)
        positions += sum(responses) + len(responses)
    linear = 2 * LAYERS * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)  # query and output, key and value, the MLP
    head = 2 * 32 * model.config.vocab_size
    # The head's logits are one chunk, computed once, and the gradient of its matrix, a product in place, is not seen: 2 of 3.
    assert done["mm"] == 3 * linear * tokens + 2 * head * positions
    assert done["_scaled_dot_product_flash_attention_for_cpu"] == LAYERS * 4 * HEADS * WIDTH * rectangles
    assert flops == done["mm"] + head * positions + 3 * LAYERS * 4 * HEADS * WIDTH * pairs

    checkpoint_activations(model)
    again, more = count()
    last = 2 * LAYERS * 64 * 32  # the product that ends a layer, whose result no gradient needs
    assert more["mm"] == done["mm"] + (linear - last) * tokens
    assert again == flops


def test_the_roofline_has_all_operations_of_a_step_and_what_memory_moves_at_least(
    shared: dict[str, Any], tmp_path: Path
) -> None:
    found = roofline.measure(shared | {"folder": str(tmp_path), "length": 96, "pairs": 1, "batch_pairs": 1})
    kinds, tokens, positions = found["kinds"], found["tokens"], found["positions"]
    model = open_model(shared)[1]
    count = count_flops(model)
    assert count is not None and kinds[roofline.LAYERS]["flops"] == count.per_token * tokens
    assert kinds[roofline.HEAD]["flops"] == 3 * 2 * 32 * model.config.vocab_size * positions
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert 28 * numbers <= kinds["AdamW"]["bytes"] < 28.1 * numbers  # and a count of steps for each tensor
    assert kinds["attention, backward"]["flops"] == 2 * kinds["attention"]["flops"] > 0
    assert all(kind["seconds"] > 0 for kind in kinds.values()) and len(kinds) == 8
    scored = roofline.measure(
        shared | {"folder": str(tmp_path), "length": 96, "pairs": 1, "batch_pairs": 1}, scores=True
    )["kinds"]
    for kind, share in {roofline.LAYERS: 3, roofline.HEAD: 3, "attention": 1}.items():  # of a step's operations
        assert share * scored[kind]["flops"] == kinds[kind]["flops"]
    assert not scored.keys() & {"attention, backward", "AdamW"}
    roofline.draw(found, tmp_path / "roofline.svg")
    assert (
        "matrices of the layers" in "\n".join(roofline.show(found)) and (tmp_path / "roofline.svg").stat().st_size > 0
    )


def test_peers_train_on_the_rows_of_our_steps_in_every_step(shared: dict[str, Any], tmp_path: Path) -> None:
    tokenizer, model = open_model(shared)
    spec = shared | {"batch_pairs": 4, "steps": 2}
    pairs = pick_pairs(spec | {"folder": str(tmp_path)}, tokenizer)
    theirs = order_pairs(spec, pairs)
    ours = make_steps(
        spec,
        make_examples(spec, pairs, model),
        PolicyForward(CPU, Layout.tree),
    )
    assert len(theirs) == spec["warming_steps"] + spec["steps"] and ours.num_steps == 3
    told = [[s.ids_T.tolist() for pair in pairs for s in pair.samples] for pairs in theirs]
    steps = [[s.ids_T.tolist() for s in ours.samples(step)] for step in range(3)]
    warming, timed = told[:2], told[2:]
    assert timed == steps[1:]
    assert warming == [max(steps, key=lambda ids: sum(map(len, ids)))] * 2
    pair = theirs[0][0]
    assert [replace(pair, row={"preferred": k}).chosen for k in (0, 1)] == pair.samples


def test_too_few_pairs_are_refused_and_not_timed_as_if_they_were_enough(shared: dict[str, Any], tmp_path: Path) -> None:
    spec = shared | {"steps": 1000, "folder": str(tmp_path / "rows")}
    with pytest.raises(ValueError, match=r"usable pairs of at most 512 tokens; expected 8008, 8 for each step"):
        pick_pairs(spec, open_model(spec)[0])


def test_a_measurement_that_fails_ends_the_others_and_says_how(
    shared: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(shared | {"batch_pairs": 4}, tmp_path / "scratch", talk=True)
    lacking = {"model": str(tmp_path / "none")}
    with pytest.raises(MeasurementFailed, match=r"(?s)plain failed:.*none"):
        bench.measure_in_turn(("plain", {"microbatches": [4]}), ("plain", lacking | {"microbatches": [4]}))
    assert not list(bench.scratch.glob("*/found.json")) and not capsys.readouterr().out
    assert not [child for child in psutil.Process().children(recursive=True) if "--child" in child.cmdline()]


@pytest.mark.slow
def test_layers_are_compiled_in_the_steps_that_say_so_alone(shared: dict[str, Any], tmp_path: Path) -> None:
    model, work = make_work(shared, [64, 64])
    compile_layers(model, device=CPU)
    counters.clear()
    runtime = Runtime(microbatch_tokens=4096, compile=True)
    job = Job(name="train", config={}, runtime={}, inputs={}, output=tmp_path, work=tmp_path)
    optimiser = make_optimiser(model, SETTINGS)
    graphs = []
    for stance in ("force_eager", "default"):
        Lane(Trainer(model, optimiser, work, SETTINGS, runtime, job, Progress()), stance).take_steps()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 0 < graphs[1]


class Recorded(Bench):
    """Comparisons of figures that are told to it."""

    def __init__(self, found: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__({}, Path(), talk=False, extent=EXTENT)
        self._found = found

    def measure_in_turn(self, *asked: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._found(kind, options) for kind, options in asked]


def recall(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what each kind took for eight pairs, in numbers that divide well: VAR a second a pair and half of one for its reference."""
    recomputes, whole = "activation_checkpointing" in options, "one_microbatch" in options
    scored = {"scoring_seconds": 4.0, "scored_pairs": 8}
    if kind == "var":
        peak = 2 * 2**30 if recomputes else 3 * 2**30 if whole else 0
        return {
            "seconds": 8.0,
            "step_seconds": [4.0, 4.0],
            "pairs": 8,
            "flops": 80.0,
            "microbatches": 1,
            "peak_bytes": peak,
            **scored,
        }
    if kind == "dpo":
        steps = {(8, False): [24.0, 24.0], (4, True): [8.0, 16.0], (8, True): [16.0, 16.0]}
        took = steps[options["microbatch"], options["tuned"]]
        tuned = {"scoring_seconds": 12.0, "scored_pairs": 8, "peak_bytes": 12 * 2**30}
        seconds = {"seconds": sum(took), "step_seconds": took}
        return {**seconds, "pairs": 8, **(tuned if options["tuned"] else {"peak_bytes": 10 * 2**30})}
    if kind == "sft":
        return {
            "seconds": {(8, False): 20.0, (4, True): 10.0, (8, True): 12.0}[options["microbatch"], options["tuned"]],
            "pairs": 8,
        }
    if kind == "plain":
        return {"seconds_per_pair": {"4": 0.8, "8": 0.9}, "flops_per_pair": 8.0}
    variants = {
        "gemm": [{"flops": 80, "seconds": 8, "pairs": 8, "tokens": 100}, {"flops": 80, "seconds": 5, "pairs": 8, "tokens": 100}],
        "groups": [{"seconds": 2, "flops": 10}, {"seconds": 6, "flops": 25}],
        "lengths": [
            {"tokens": 1000, "seconds": 4, "flops": 10_000, "attention_flops": 1000},
            {"tokens": 1000, "seconds": 8, "flops": 16_000, "attention_flops": 7000},
        ],
    }  # fmt: skip
    return {"variants": variants[kind], "gemm_rate": {"gemm": 12.5, "groups": 1.0, "lengths": 5000.0}[kind]}


def test_every_throughput_figure_is_made_of_what_was_measured_by_hand() -> None:
    found = run_groups(Recorded(recall), [name for name in GROUPS if name not in LONG_GROUPS], expected={})
    expected = {
        "gemm_share": 0.8,
        "gemm_share_compiled": 1.28,
        "var_vs_dpo_speed": 6.0,  # seconds a pair: 6 and 1
        "var_vs_dpo_tuned_speed": 3.0,  # at its best, a micro-batch of 4
        "var_vs_dpo_speed_with_scoring": 3.0,  # 6 to 1.5, but tuned 3 + 1.5 to 1.5
        "var_vs_dpo_peak_memory": 0.2,  # both compute activations again
        "var_vs_dpo_tuned_peak_memory": 0.25,  # neither does
        "dpo_tuned_microbatch": 4,
        "var_vs_sft_time": 0.4,
        "var_vs_sft_tuned_time": 0.8,
        "var_vs_plain_loop_time": 1.25,
        "var_vs_plain_loop_flops": 1.25,
        "k8_vs_k2_cost_over_flops": 1.2,
        "dpo_tuned_scoring_seconds_per_pair": 1.5,
        "var_scoring_seconds_per_pair": 0.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["tokens_per_second_by_length"] == {128: 250.0, 512: 125.0}
    assert found["tokens_per_second_predicted_by_length"] == {128: 250.0, 512: 156.2}
    assert found["tokens_per_second_over_predicted_by_length"] == {128: 1.0, 512: 0.8}
    assert found["tokens_per_second_over_possible_by_length"] == {128: 1.0, 512: 0.844}  # 10 1/6 to 17 1/6 a token
    assert found["gemm_share_by_length"] == {128: 0.5, 512: 0.4}
    assert found["var_vs_dpo_speed_ci"] == pytest.approx([6.0, 6.0])
    # Twice and four times as long: sqrt(8), by a factor of 2^(t/2), t 12.706 with one degree of freedom
    assert found["var_vs_dpo_tuned_speed_ci"] == pytest.approx([8**0.5 * 2**-6.3531, 8**0.5 * 2**6.3531], rel=1e-4)


def test_every_figure_of_the_gpu_is_made_of_what_was_measured_by_hand() -> None:
    def recall(kind: str, options: dict[str, Any]) -> dict[str, Any]:
        if kind == "var":
            rates = {"flops": 800.0, "gemm_rate": 200.0, "device": "cuda", "parameters": 1, "peak_device_gib": 1.0}
            return {"seconds": 8.0, "pairs": 64, "tokens": 8000, **rates}
        seconds = {(8, False): 80.0, (16, True): 40.0, (32, True): 20.0, (64, True): 24.0}
        return {"seconds": seconds[options["microbatch"], options["tuned"]], "pairs": 64, "tokens": 12_000}

    found = training_gpu.compare(Recorded(recall), batch_pairs=64, sweep_seconds=60.0, profile=False)
    expected = {
        "mfu": 0.5,
        "tokens_per_second": 1000.0,
        "var_vs_dpo_tokens": 1000 / 150,
        "var_vs_dpo_tuned_tokens": 1000 / 600,
        "var_vs_dpo_pairs": 10.0,
        "var_vs_dpo_tuned_pairs": 2.5,
        "dpo_tuned_microbatch": 32,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["sweep_ended"] == "slower"


def test_the_machines_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert engine.gemm_rate(size=8) == 2 * 8**3 / 2.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_peers_take_their_steps_with_our_optimiser_in_our_precision(precision: str, tmp_path: Path) -> None:
    """TRL's own default is bfloat16."""
    spec = SHARED | {"folder": str(tmp_path), "precision": precision, "microbatch": 2, "steps": 5}
    for config in (DPOConfig, SFTConfig):
        arguments = config(**peers.shared(spec))
        assert (arguments.bf16, arguments.fp16) == (precision == "bfloat16", False)
        assert arguments.train_batch_size * arguments.gradient_accumulation_steps == SHARED["batch_pairs"]
        assert arguments.optim == "adamw_torch_fused" and arguments.lr_scheduler_type == "constant"
        theirs = (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm, arguments.warmup_steps)
        assert theirs == (SETTINGS.learning_rate, SETTINGS.weight_decay, SETTINGS.max_grad_norm, 0)
        ours = make_optimiser(torch.nn.Linear(1, 1), SETTINGS).defaults
        assert (arguments.adam_beta1, arguments.adam_beta2) == ours["betas"] and arguments.adam_epsilon == ours["eps"]


@pytest.mark.slow
def test_the_command_measures_the_group_of_the_key_that_it_is_asked_for(
    shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the real model: one line of JSON, with what was left out of it."""
    asked = ["--only", "k8_vs_k2_cost_over_flops", "--quick", "--json", "--data", shared["data"]]
    monkeypatch.setattr(sys, "argv", ["benchmarks.training", *asked])
    main()
    printed, told = capsys.readouterr()
    (line,) = printed.splitlines()
    found = json.loads(line)
    assert {key for key, group in GROUP_OF.items() if key in found} == {"k8_vs_k2_cost_over_flops"}
    assert 0.5 < found["k8_vs_k2_cost_over_flops"] < 2 and 1 < found["k8_vs_k2_flops"] < 8
    assert (found["steps"], found["batch_pairs"], found["microbatch_tokens"]) == (1, 8, 4096)
    assert (
        found["quick_leaves_out"]["groups"] == ["memory", "grpo", "reward_gain", "reward_targets"]
        and found["quick_leaves_out"]["steps"] == 4
    )
    assert "group 1 of 1: groups, about 80 s" in told and told.splitlines()[-1].endswith("done")


@pytest.mark.slow
def test_every_throughput_group_runs_to_its_figures(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in GROUPS if name not in LONG_GROUPS]
    found = run_groups(bench, names, expected={})
    told = capsys.readouterr().err
    turns = re.findall(r"\] (\w+).*: step (\d) of 3\n", told)
    assert turns == [(kind, n) for kinds in (("var", "dpo"), ("var", "dpo", "dpo"), ("var", "sft", "sft"), ("var", "plain")) for n in "123" for kind in kinds]  # fmt: skip
    ratios = (
        "gemm_share", "gemm_share_compiled", "var_vs_dpo_speed", "var_vs_dpo_tuned_speed", "var_vs_dpo_speed_with_scoring", "var_vs_sft_time",
        "var_vs_dpo_default_speed_with_scoring", "var_vs_dpo_tuned_speed_with_scoring",
        "var_vs_sft_tuned_time", "var_vs_plain_loop_time", "var_vs_dpo_peak_memory", "var_vs_dpo_tuned_peak_memory", "k8_vs_k2_cost_over_flops",
    )  # fmt: skip
    assert all(found[name] > 0 for name in ratios)
    assert {key for key, group in GROUP_OF.items() if group in names} <= found.keys() and set(GROUP_OF.values()) == set(
        GROUPS
    )
    assert (found["var_microbatches"], found["dpo_microbatch"], found["sft_microbatch"]) == (1, 8, 8)
    assert found["k8_vs_k2_flops"] > 2
    assert 1 < found["var_vs_plain_loop_flops"] < 2.5  # two responses instead of one, the prompt once on both sides
    for name in ("dpo_tuned", "sft_tuned", "plain_loop"):
        seconds = {int(size): value for size, value in found[f"{name}_sweep_seconds_per_pair"].items()}
        assert set(seconds) == {4, 8}
        if name == "dpo_tuned":  # what was measured beside ours decides
            seconds = {int(size): value for size, value in found["dpo_tuned_seconds_per_pair"].items()}
        assert seconds[found[f"{name}_microbatch"]] == min(seconds.values())
    rate, predicted = found["tokens_per_second_by_length"], found["tokens_per_second_predicted_by_length"]
    assert predicted[128] == rate[128] and predicted[512] < rate[128]
    assert found["attention_flop_share_by_length"][512] > found["attention_flop_share_by_length"][128] > 0
    assert found["tokens_per_second_over_predicted_by_length"][512] == pytest.approx(
        rate[512] / predicted[512], rel=1e-2
    )

    kept = [json.loads(path.read_text()) for path in bench.scratch.glob("*/found.json")]
    peers = [(json.loads(one["key"]), one["found"]) for one in kept if json.loads(one["key"])["kind"] in ("dpo", "sft")]
    assert (
        len(peers) == 11
    )  # of each kind two of a sweep, by default, and at its best (DPO two); DPO's memory, either way
    for spec, measured in peers:
        assert measured["recomputes"] is not spec["tuned"]
        assert measured["padded_tokens"] >= measured["tokens"] and (measured["tokens"] > 0) is (spec["steps"] > 0)
        if spec["kind"] == "dpo":
            assert (measured["scoring_seconds"] > 0) is spec["tuned"]
    for kind in ("dpo", "sft"):  # the same work, whichever way
        timed = [(spec, measured) for spec, measured in peers if spec["kind"] == kind and spec["steps"]]
        assert len({measured["tokens"] for _, measured in timed}) == 1
        for warming in (1, 2):
            one, *others = (measured["loss"] for spec, measured in timed if spec["warming_steps"] == warming)
            assert others == pytest.approx([one] * len(others), rel=1e-4) and others

    plot_lengths(found, tmp_path / "lengths.svg")
    assert "tokens a pair" in (tmp_path / "lengths.svg").read_text()


@pytest.mark.slow
def test_the_gpus_comparison_counts_what_each_side_feeds_its_model(
    shared: dict[str, Any], tiny_policy: Path, tmp_path: Path
) -> None:
    """On a CPU, in float32, on random weights: all of it but the device."""
    architecture = {"architecture": str(tiny_policy / "config.json")}
    bench = Bench(shared | architecture, tmp_path / "scratch", talk=False)
    found = training_gpu.compare(bench, batch_pairs=8, sweep_seconds=600.0, profile=False, first=4)
    assert found["sweep_ended"] in ("slower", "batch")
    assert set(found["dpo_tuned_sweep_seconds_per_pair"]) == {4, 8}
    spec = shared | {"folder": str(tmp_path / "rows")}
    *_, step = order_pairs(spec, pick_pairs(spec, open_model(spec)[0]))
    forward = PolicyForward(CPU, Layout.tree)
    once = forward.size([sample for pair in step for sample in pair.samples], np.repeat(np.arange(8), 2)).tokens
    twice = sum(len(sample.ids_T) for pair in step for sample in pair.samples)
    ratio = found["var_vs_dpo_tokens"] / found["var_vs_dpo_pairs"]
    assert ratio == pytest.approx(once / (twice + 2 * len(step)))  # a line break behind every answer's end is read, too
    assert found["tokens_per_second"] == pytest.approx(found["pairs_per_second"] * once / len(step))
