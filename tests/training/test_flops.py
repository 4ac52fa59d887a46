"""Counted operations against torch's own counter on real steps, and against sums written out by hand."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    RobertaConfig,
)

from tests.architectures import CONFIGS as FAMILIES
from tests.architectures import SMALL
from training import devices, train
from training.config import Layout, LoraConfig, Precision
from training.devices import ACCELERATORS, device_peak, find_accelerator, measure_gemm
from training.flops import Flops, count_flops, count_pairs, count_reward_flops
from training.job import Job
from training.lora import add_adapter
from training.render import Rendered
from training.reward.render import RewardInput
from training.reward_model import RewardForward
from training.steps import Forwarded
from training.train import PolicyForward
from training.tree import enable_trees

CPU = torch.device("cpu")
CONFIGS = FAMILIES | {"qwen3": Qwen3Config(**SMALL, head_dim=6)}
LAYERS, HEADS = 2, 4
ENCODER: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_labels": 1, "pad_token_id": 0,
}  # fmt: skip
REWARD_CONFIGS = {
    "bert": BertConfig(**ENCODER),
    "roberta": RobertaConfig(**ENCODER),
    "llama": LlamaConfig(**ENCODER, num_key_value_heads=2),
}


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval()


def make_sample(prompt: int, response: int) -> Rendered:
    ids = np.random.default_rng(prompt).integers(0, 61, size=prompt + response)
    return Rendered(ids_T=ids.astype(np.int32), start=prompt)


def take_step(model: Any, sample: Rendered, flops: Flops) -> tuple[Forwarded, dict[str, int]]:
    """Run one row forward and backward; return what came out, and the operations that torch counted by their kind."""
    with FlopCounterMode(display=False) as counter:
        forward = PolicyForward(CPU, Layout.rows, flops)
        out = forward.values(model, forward.load([sample], np.array([0])), np.array([1.0]))
        assert out.weighted is not None
        out.weighted.backward()
    return out, {str(op).split(".")[1]: int(n) for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_real_step_costs_what_torch_counts(name: str) -> None:
    """One row of T tokens. Matrices to the last operation, the head's too: no logit is computed twice. Eager attention computes all T x T pairs; T (T + 1) / 2 of them, fewer with a window, are of use."""
    model, sample = make_model(name), make_sample(9, 13)
    flops = count_flops(model)
    assert flops is not None
    out, done = take_step(model, sample, flops)
    T, P = 21, 13  # of 22 tokens the last is not read
    head = 2 * 16 * 61 * P
    width = getattr(model.config, "head_dim", None) or 4
    # torch's counter knows no product in place, and the gradient of the head's matrix is one: of the head's others it sees 2
    assert done["mm"] + done.get("addmm", 0) == flops.per_token * T + 2 * head
    assert done["bmm"] == 3 * (2 * 2 * HEADS * width) * LAYERS * T * T
    window = {"mistral": [6, 6], "gemma2": [6, None], "gemma3": [6, 6]}.get(name, [None, None])
    useful = sum(sum(min(q + 1, w or T) for q in range(T)) for w in window)
    assert out.flops == flops.per_token * T + 3 * (head + 2 * 2 * HEADS * width * useful)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_beside_an_adapter_a_step_costs_what_torch_counts(name: str) -> None:
    """No gradient of frozen matrices, nor of what the first layer's query, key and value read: frozen embeddings."""
    model, sample = make_model(name), make_sample(9, 13)
    whole = count_flops(model)
    add_adapter(model, LoraConfig(rank=2, alpha=4))
    flops = count_flops(model)
    assert whole and flops
    _, done = take_step(model, sample, flops)
    T, P = 21, 13  # of 22 tokens the last is not read
    head = 2 * 16 * 61 * P
    assert done["mm"] + done.get("addmm", 0) == flops.per_token * T + 2 * head
    assert flops.per_position * P == 2 * head
    assert 2 / 3 * whole.per_token < flops.per_token < whole.per_token


def test_a_tree_costs_its_prompt_once_and_each_response_its_way_to_the_root() -> None:
    model = make_model("mistral")
    enable_trees(model)
    flops = count_flops(model)
    assert flops is not None
    samples = [make_sample(9, 4), make_sample(9, 11), make_sample(3, 2)]
    forward = PolicyForward(CPU, Layout.tree, flops)
    out = forward.values(model, forward.load(samples, np.array([0, 0, 1])))
    seen = [*range(9), *range(9, 12), *range(9, 19), *range(3), 3]  # the position of every token that is read
    pairs = sum(min(position + 1, 6) for position in seen)
    assert out.flops == flops.per_token * len(seen) + 3 * (2 * 16 * 61 * 17 + LAYERS * 4 * HEADS * 4 * pairs)


@pytest.mark.parametrize("name", REWARD_CONFIGS)
def test_a_reward_models_step_costs_what_torch_counts(name: str) -> None:
    """Rows of 9 and 5 tokens. An encoder's tokens see all of their row; what stands behind the trunk counts for one position of a row, though a
    decoder's head is applied to all."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(REWARD_CONFIGS[name], attn_implementation="eager")
    flops = count_reward_flops(model)
    assert flops is not None
    forward = RewardForward(model)
    inputs = [RewardInput(list(range(2, 2 + n)), None, cut=False) for n in (9, 5)]
    told, mm, bmm = 0, 0, 0
    for one in inputs:
        with FlopCounterMode(display=False) as counter:
            out = forward.values(model, forward.load([one], np.array([0])))
            out.value_B.sum().backward()
        done = {str(op).split(".")[1]: int(n) for op, n in counter.get_flop_counts()["Global"].items()}
        told, mm, bmm = told + out.flops, mm + done["mm"] + done.get("addmm", 0), bmm + done["bmm"]
    more = 0 if flops.sees_all else (14 - 2) * 3 * 2 * 16  # positions of the head that are not read
    assert mm == flops.per_token * 14 + flops.per_position * 2 + more
    assert bmm == 3 * 2 * 2 * 16 * LAYERS * (81 + 25)
    seen = 81 + 25 if flops.sees_all else 45 + 15
    assert told == flops.per_token * 14 + flops.per_position * 2 + 3 * 2 * 2 * 16 * LAYERS * seen
    together = forward.values(model, forward.load(inputs, np.array([0, 1])))
    assert together.flops == told and together.num_padded == 18


def test_a_reward_model_whose_attention_is_another_is_not_counted() -> None:
    model = AutoModelForSequenceClassification.from_config(DebertaV2Config(**ENCODER, relative_attention=True))
    assert count_reward_flops(model) is None


def test_padding_costs_nothing() -> None:
    model = make_model("llama")
    forward = PolicyForward(CPU, Layout.rows, count_flops(model))
    samples = [make_sample(9, 13), make_sample(2, 3)]
    together = forward.values(model, forward.load(samples, np.array([0, 1]))).flops
    assert together == sum(forward.values(model, forward.load([sample], np.array([0]))).flops for sample in samples)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_pairs_are_those_counted_one_by_one(window: int | None) -> None:
    for start in range(12):
        for length in range(1, 12):
            expected = sum(min(position + 1, window or 99) for position in range(start, start + length))
            assert count_pairs(start, length, window=window) == expected


def test_experts_are_not_counted_rather_than_counted_wrong() -> None:
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4))
    assert count_flops(model) is None
    forward = PolicyForward(CPU, Layout.rows, None)
    out = forward.values(model, forward.load([make_sample(3, 4)], np.array([0])))
    assert out.flops == 0


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Tesla T4", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_an_accelerator_is_found_by_the_name_that_torch_gives_it(torch_name: str, name: str | None) -> None:
    found = find_accelerator(torch_name)
    assert (found.name if found else None) == name


def test_the_table_is_consistent() -> None:
    assert all(find_accelerator(device.name) is device for device in ACCELERATORS)
    assert all(device.bf16_flops > device.tf32_flops >= device.fp32_flops for device in ACCELERATORS)
    h100 = find_accelerator("H100")
    assert h100 and (h100.peak_flops(Precision.bfloat16), h100.peak_flops(Precision.float32)) == (989e12, 67e12)


def test_a_cpus_rate_is_the_operations_of_a_product_over_the_shortest_time_that_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[float] = []
    threads: list[int] = []

    def read_clock() -> float:
        read.append(time.perf_counter())
        threads.append(torch.get_num_threads())
        return read[-1]

    monkeypatch.setattr(devices, "time", SimpleNamespace(monotonic=time.monotonic, perf_counter=read_clock))
    there = torch.get_num_threads()
    rate = measure_gemm(threads=1)
    shortest = min(end - begin for begin, end in zip(read[::2], read[1::2], strict=True))
    assert rate == 2 * 1024**3 / shortest
    assert {*threads} == {1} and torch.get_num_threads() == there


def test_a_cpus_rate_is_what_a_product_of_another_shape_gives_too() -> None:
    """A wide bound, since the machine may be busy: a factor of the multiply or of the size would be out of it."""
    rate = measure_gemm()
    assert device_peak(CPU, Precision.float32) == pytest.approx(rate, rel=0.8)
    a, b = torch.ones(600, 1500), torch.ones(1500, 900)
    with FlopCounterMode(display=False) as counter:
        a @ b
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    assert 0.1 * rate < counter.get_total_flops() / min(seconds) < 3 * rate


def test_each_training_step_says_its_rate_and_share(
    tiny_policy: Path, make_job: Callable[..., Job], make_row: Any, write_rows: Any, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows", [make_row(f"Question {i}?", ["Yes", "No"]) for i in range(4)])
    config = {"objective": "sft", "batch_prompts": 2, "max_tokens": 64}
    job = make_job("train", "a", config=config, inputs={"rows": rows, "base": tiny_policy})
    train.run(job)
    for line in map(json.loads, (job.output / "metrics.jsonl").read_text().splitlines()):
        assert 0 < line["train/flop_share"] < 1
        assert line["train/tflops_per_second"] > 0
