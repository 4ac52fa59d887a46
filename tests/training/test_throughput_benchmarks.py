"""The throughput comparisons: their whole path with TRL's own trainers on a model of two layers, and what their figures are made of."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_gpu
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
from benchmarks.training import GROUP_OF, GROUPS, LONG_GROUPS, SHARED, Bench, Extent, plot_lengths, run_groups
from training.checkpoint import Progress
from training.config import Layout, Runtime
from training.flops import count_flops
from training.job import Job
from training.loop import Trainer, make_optimiser
from training.model import checkpoint_activations, compile_layers
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


def make_work(spec: dict[str, Any], lengths: list[int]) -> tuple[Any, Any]:
    """Return the tiny policy ready for trees, and VAR's steps over one pair of each length, half of them a step."""
    model = open_model(spec)[1].eval()
    enable_trees(model)
    examples = [make_synthetic(length, index, model) for index, length in enumerate(lengths)]
    return model, make_steps(spec, examples, PolicyForward(CPU, Layout.tree, count_flops(model)))


def test_flops_of_a_step_are_those_that_torch_counts_without_what_is_masked_or_computed_again(
    shared: dict[str, Any],
) -> None:
    """Two trees of a micro-batch. torch counts attention as it runs on a CPU, a rectangle of queries and keys for each prompt and each
    response; of use are the pairs of a token and one on its way to the root."""
    model, work = make_work(shared, [60, 100, 60, 100])

    def count() -> tuple[int, dict[str, int]]:
        (members,) = work.cut(0, budget=10**6)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            part = work.part(model, work.load(0, members))
            part.loss.backward()
        done = counter.get_flop_counts()["Global"]
        return part.flops, {str(op).split(".")[1]: int(n) for op, n in done.items()}

    flops, done = count()
    rectangles = pairs = tokens = positions = 0
    for example in work.rows(0):
        prompt = example.samples[0].start
        responses = [sample.num_trained for sample in example.samples]
        rectangles += prompt**2 + sum(n * (prompt + n) for n in responses)
        pairs += sum(range(1, prompt + 1)) + sum(sum(range(prompt + 1, prompt + n + 1)) for n in responses)
        tokens += prompt + sum(responses)
        positions += sum(responses)
    linear = 2 * LAYERS * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)  # query and output, key and value, the MLP
    head = 2 * 32 * model.config.vocab_size
    # The head's logits are one chunk, computed once, and the gradient of its matrix, a product in place, is not seen: 2 of 3.
    assert done["mm"] == 3 * linear * tokens + 2 * head * positions
    assert done["bmm"] == 3 * LAYERS * 4 * HEADS * WIDTH * rectangles
    assert flops == done["mm"] + head * positions + 3 * LAYERS * 4 * HEADS * WIDTH * pairs

    checkpoint_activations(model)
    again, more = count()
    last = 2 * LAYERS * 64 * 32  # the product that ends a layer, whose result no gradient needs
    assert more["mm"] == done["mm"] + (linear - last) * tokens
    assert again == flops


def test_peers_train_on_the_rows_of_our_steps_in_every_step(shared: dict[str, Any], tmp_path: Path) -> None:
    tokenizer, model = open_model(shared)
    spec = shared | {"batch_pairs": 4, "steps": 2}
    theirs = order_pairs(spec | {"folder": str(tmp_path / "theirs")}, tokenizer)
    ours = make_steps(
        spec,
        make_examples(spec, pick_pairs(spec | {"folder": str(tmp_path / "ours")}, tokenizer), model),
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
        Lane(Trainer(model, optimiser, work, SETTINGS, runtime, job, Progress()), stance).take_step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 0 < graphs[1]


@pytest.mark.slow
def test_every_throughput_group_runs_to_its_figures(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in GROUPS if name not in LONG_GROUPS]
    found = run_groups(bench, names, expected={})
    told = capsys.readouterr().err
    turns = re.findall(r"\] (\w+).*: step (\d) of 3\n", told)
    assert turns == [(kind, n) for kinds in (("var", "dpo"), ("var", "dpo"), ("var", "sft", "sft"), ("var", "plain")) for n in "123" for kind in kinds]  # fmt: skip
    ratios = (
        "gemm_share", "gemm_share_compiled", "var_vs_dpo_speed", "var_vs_dpo_tuned_speed", "var_vs_dpo_speed_with_scoring", "var_vs_sft_time",
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
        assert set(seconds) == {4, 8} and seconds[found[f"{name}_microbatch"]] == min(seconds.values())
    rate, predicted = found["tokens_per_second_by_length"], found["tokens_per_second_predicted_by_length"]
    assert predicted[128] == rate[128] and predicted[512] < rate[128]
    assert found["attention_flop_share_by_length"][512] > found["attention_flop_share_by_length"][128] > 0
    assert found["tokens_per_second_over_predicted_by_length"][512] == pytest.approx(
        rate[512] / predicted[512], rel=1e-2
    )

    kept = [json.loads(path.read_text()) for path in bench.scratch.glob("*/found.json")]
    peers = [(json.loads(one["key"]), one["found"]) for one in kept if json.loads(one["key"])["kind"] in ("dpo", "sft")]
    assert len(peers) == 9  # of each kind two of a sweep, and by default and at its best beside ours; DPO's memory
    for spec, measured in peers:
        assert measured["recomputes"] is not spec["tuned"]
        assert measured["padded_tokens"] >= measured["tokens"] and (measured["tokens"] > 0) is (spec["steps"] > 0)
        if spec["kind"] == "dpo":
            assert (measured["scoring_seconds"] > 0) is spec["tuned"]
    for kind in ("dpo", "sft"):  # the same work, whichever way
        timed = [(spec, measured) for spec, measured in peers if spec["kind"] == kind and spec["steps"]]
        assert len({measured["tokens"] for _, measured in timed}) == 1
        for warming in (1, 2):
            one, other = (measured["loss"] for spec, measured in timed if spec["warming_steps"] == warming)
            assert one == pytest.approx(other, rel=1e-4)

    plot_lengths(found, tmp_path / "lengths.html")
    assert "tokens a pair" in (tmp_path / "lengths.html").read_text()


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
    *_, step = order_pairs(spec, open_model(spec)[0])
    once = sum(pair.samples[0].start + sum(sample.num_trained for sample in pair.samples) for pair in step)
    twice = sum(len(sample.ids_T) for pair in step for sample in pair.samples)
    ratio = found["var_vs_dpo_tokens"] / found["var_vs_dpo_pairs"]
    assert ratio == pytest.approx(once / (twice + 2 * len(step)))  # a line break behind every answer's end is read, too
    assert found["tokens_per_second"] == pytest.approx(found["pairs_per_second"] * once / len(step))
