"""What only a GPU can show: `pytest -m gpu` on a machine that has one. The CPU's numbers are what is expected."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from tests.training.test_launch import CONFIG
from training import generate, reference, train
from training.checkpoint import Progress
from training.config import Layout, Precision, Runtime, Schedule
from training.data.batch import lay_out
from training.data.examples import Example
from training.distributed import World, join_world
from training.head import CHUNK_ELEMENTS
from training.job import Job, read_json_lines
from training.logprobs import check_layout, sum_logps, weigh_logps
from training.loop import Settings, Trainer, make_optimiser
from training.model import DTYPES, load_policy, prepare_layers
from training.objectives.sft import Sft
from training.render import Rendered
from training.sharding import load_sharded_policy
from training.steps import Steps
from training.train import PolicyForward
from training.tree import Tree

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
# heads of 16: FlexAttention takes none that are smaller
SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, **HEADS, sliding_window=6),
    "gemma2": Gemma2Config(**SMALL, **HEADS, sliding_window=6, attn_logit_softcapping=2.0),
}
SETTINGS = Settings(1e-3, 0.0, Schedule.constant, 0.0, 1e9, Precision.float32, 0)


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """Give the GPU, and compile anew."""
    assert torch.cuda.is_available(), "this test is marked gpu: torch sees none here"
    torch.compiler.reset()
    yield torch.device("cuda")
    torch.cuda.empty_cache()


def make_model(config: Any, device: torch.device) -> Any:
    torch.manual_seed(0)
    stock = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}
    return AutoModelForCausalLM.from_config(config, **stock).to(device).eval()


def make_samples(rng: np.random.Generator, prompt: int, *responses: int) -> list[Rendered]:
    ids = rng.integers(0, 61, size=prompt)
    return [Rendered(ids_T=np.r_[ids, rng.integers(0, 61, size=n)].astype(np.int32), start=prompt) for n in responses]


def go_on(system: np.ndarray, sample: Rendered) -> Rendered:
    """Return a sample behind a system prompt."""
    return Rendered(ids_T=np.r_[system, sample.ids_T].astype(np.int32), start=len(system) + sample.start)


def take_gradients(model: Any, groups: list[list[Rendered]], layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Return the gradients of a sum of log-probabilities, each with a weight of its own: on a GPU as training finds them, in the head's forward
    pass; on the CPU as autograd does, in its backward pass."""
    samples = [sample for group in groups for sample in group]
    group_B = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    weight_B = np.linspace(-1.0, 2.0, len(samples))
    micro = lay_out(samples, group_B, device=device, layout=layout)
    model.zero_grad()
    if device.type == "cuda":
        weigh_logps(model, micro, weight_B)[0].backward()
    else:
        (sum_logps(model, micro) * torch.from_numpy(weight_B)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).cpu() for name, g in gradients.items()}


@pytest.mark.parametrize(
    ("name", "layout", "compiled", "again"),
    [
        *((name, layout, compiled, False) for name in CONFIGS for layout in Layout for compiled in (False, True)),
        ("llama", Layout.tree, False, True),
        ("llama", Layout.tree, True, True),
    ],
)
def test_gradients_are_those_of_the_cpu(
    name: str, layout: Layout, compiled: bool, again: bool, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, with other lengths and another number of prompts, behind one system prompt: the second time nothing is compiled anew. The head
    has several chunks of positions; `again`: layers compute their activations again."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cuda", 61 * 100)
    here, there = make_model(CONFIGS[name], CPU), make_model(CONFIGS[name], cuda)
    prepare_layers(there, Runtime(compile=compiled, activation_checkpointing=again), device=cuda)
    rng = np.random.default_rng(0)
    made: list[int] = []
    system = rng.integers(0, 61, size=20)
    # Of six blocks of the mask, and of ten: a size that is the number of heads too, or of keys, is compiled for by itself.
    for responses, more in (((40, 240, 1), 1), ((7, 775), 3)):
        groups = [make_samples(rng, 90, *responses), make_samples(rng, 140, 2, 120)]
        groups += [make_samples(rng, 1, 3) for _ in range(more)]
        groups = [[go_on(system, sample) for sample in group] for group in groups]
        for model, device in ((here, CPU), (there, cuda)):
            check_layout(model, groups, layout=layout, device=device)
        expected = take_gradients(here, groups, layout, CPU)
        got = take_gradients(there, groups, layout, cuda)
        scale = max(gradient.abs().max() for gradient in expected.values())
        assert max((got[n] - gradient).abs().max() for n, gradient in expected.items()) < 1e-4 * scale
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[0] == made[1]


def test_compiled_layers_have_the_gradients_of_plain_ones_as_a_large_model_trains(cuda: torch.device) -> None:
    """In bfloat16, heads of 64 that share keys: there the kernels' options are tuned to the device."""
    wide = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    rng = np.random.default_rng(0)
    groups = [make_samples(rng, int(rng.integers(50, 200)), *rng.integers(10, 150, size=2)) for _ in range(12)]
    system = rng.integers(0, 61, size=40)
    groups += [[go_on(system, sample) for sample in group] for group in groups[:6]]
    found = []
    for compiled in (False, True):
        model = make_model(LlamaConfig(vocab_size=61, initializer_range=0.1, **wide), cuda)
        prepare_layers(model, Runtime(compile=compiled), device=cuda)
        check_layout(model, groups, layout=Layout.tree, device=cuda, narrow=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found.append(take_gradients(model, groups, Layout.tree, cuda))
    plain, got = found
    gap = torch.stack([(got[name] - gradient).norm() for name, gradient in plain.items()]).norm()
    assert gap < 3e-2 * torch.stack([gradient.norm() for gradient in plain.values()]).norm()


@pytest.fixture
def base(tiny_policy: Path, tmp_path: Path) -> Path:
    """Save a policy whose heads FlexAttention takes."""
    folder = tmp_path / "base"
    make_model(LlamaConfig.from_pretrained(tiny_policy, hidden_size=64, head_dim=16), CPU).save_pretrained(folder)
    for file in tiny_policy.iterdir():
        if file.name.startswith(("tokenizer", "chat", "special")):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_training_in_bfloat16_keeps_weights_in_float32_and_follows_the_cpu(
    cuda: torch.device, train_inputs: dict[str, str], base: Path, make_job: Callable[..., Job]
) -> None:
    inputs = {"rows": Path(train_inputs["rows"]), "base": base}
    sft = {"objective": "sft", "responses": "all", "batch_prompts": 4, "epochs": 4, "max_tokens": 96}
    losses = {}
    for device, precision in (("cpu", "float32"), ("cuda", "bfloat16")):
        own: dict[str, Any] = {"device": device, "compile": device == "cuda", "microbatch_tokens": 128}
        job = make_job("train", device, config={**sft, "precision": precision}, inputs=inputs, **own)
        train.run(job)
        lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
        losses[device] = [line["train/loss"] for line in lines]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=3e-2)
    assert {tensor.dtype for tensor in load_file(job.output / "model.safetensors").values()} == {torch.float32}
    assert json.loads((job.output / "summary.json").read_text())["flops"] > 0


@pytest.fixture
def rank(cuda: torch.device) -> Iterator[World]:
    """Give the one rank of a process group over NCCL."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    yield join_world(device, replicas=1)
    dist.destroy_process_group()


@pytest.mark.parametrize(("precision", "bound"), [(Precision.float32, 1e-4), (Precision.bfloat16, 5e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_sharded_policy_has_the_gradients_of_a_whole_one(
    compiled: bool, precision: Precision, bound: float, rank: World, base: Path
) -> None:
    rng = np.random.default_rng(0)
    groups = [make_samples(rng, 90, 40, 111, 1), make_samples(rng, 140, 2, 120)]
    whole, _ = load_policy(base, precision=Precision.float32, device=CPU)
    policy, _ = load_sharded_policy(base, rank, precision=precision, runtime=Runtime(compile=compiled))
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    check_layout(whole, [groups[0]], layout=Layout.tree, device=CPU)
    expected = take_gradients(whole, groups, Layout.tree, CPU)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == Precision.bfloat16):
        check_layout(policy, [groups[0]], layout=Layout.tree, device=rank.device, dtype=DTYPES[precision])
        got = take_gradients(policy, groups, Layout.tree, rank.device)
    gaps, norms = zip(*(((got[f"model.{n}"] - g).norm(), g.norm()) for n, g in expected.items()), strict=True)
    assert torch.stack(gaps).norm() < bound * torch.stack(norms).norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL between two GPUs needs two")
def test_two_gpus_train_the_model_of_one(
    train_inputs: dict[str, str], base: Path, make_job: Callable[..., Job]
) -> None:
    """To its weights, and by the same gradients: AdamW hides a factor in them."""
    inputs = {"rows": Path(train_inputs["rows"]), "base": base}
    weights, norms = [], []
    for ranks in (1, 2):
        job = make_job("train", f"on-{ranks}", config=CONFIG, inputs=inputs, device="cuda", ranks=ranks, microbatch_tokens=128)  # fmt: skip
        told = {
            "job": job.name,
            "config": job.config,
            "runtime": job.runtime,
            "output": str(job.output),
            "work": str(job.work),
        }
        file = job.work / "job.json"
        file.write_text(json.dumps(told | {"inputs": {name: str(path) for name, path in inputs.items()}}))
        subprocess.run([sys.executable, "-m", "training", str(file)], check=True, timeout=300)
        weights.append(load_file(job.output / "model.safetensors"))
        norms.append(read_json_lines(job.output / "metrics.jsonl")[0]["train/grad_norm"])
    one, two = weights
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert max((two[name] - tensor).abs().max() for name, tensor in one.items()) < 1e-4


def test_answers_and_their_log_probabilities_are_those_of_the_cpu(
    cuda: torch.device, train_inputs: dict[str, str], base: Path, make_job: Callable[..., Job]
) -> None:
    rows = Path(train_inputs["rows"])
    answers, logps = {}, {}
    for device in ("cpu", "cuda"):
        config = {"split": "train", "max_new_tokens": 24, "samples_per_prompt": 2}
        job = make_job(
            "generate", f"generate-{device}", config=config, inputs={"rows": rows, "policy": base}, device=device
        )
        generate.run(job)
        answers[device] = pq.read_table(job.output / "responses.parquet").to_pylist()
        inputs = {"rows": rows, "reference": base}
        job = make_job("score_reference", f"score-{device}", config={"max_tokens": 96}, inputs=inputs, device=device)
        reference.run(job)
        logps[device] = [row["logp"] for row in pq.read_table(job.output / "scores.parquet").to_pylist()]
    assert answers["cuda"] == answers["cpu"]
    assert np.allclose(logps["cuda"], logps["cpu"], rtol=0, atol=1e-4)


def make_trainer(model: Any, device: torch.device, job: Job, *, budget: int) -> Trainer:
    rng = np.random.default_rng(0)
    groups = [make_samples(rng, 600, 200, 200) for _ in range(60)]
    examples = [Example(f"row{n}", tuple(group), (0, 1), 2, np.array([200, 200])) for n, group in enumerate(groups)]
    work = Steps(examples, Sft(), PolicyForward(device, Layout.tree), batch_prompts=60, epochs=1, seed=0)
    check_layout(model, [groups[0]], layout=Layout.tree, device=device)
    runtime = Runtime(microbatch_tokens=budget)
    return Trainer(model, make_optimiser(model, SETTINGS), work, SETTINGS, runtime, job, Progress(), World(device))


def test_a_step_without_room_is_taken_again_in_halves(cuda: torch.device, make_job: Callable[..., Job]) -> None:
    """60,000 tokens through eight layers keep 25 GiB for the backward pass, in 8."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = make_model(LlamaConfig(vocab_size=61, num_key_value_heads=8, **wide), cuda)
    job = make_job("train", "room", config={}, inputs={})
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 8 * 2**30 / total))
    try:
        narrow = make_trainer(model, cuda, job, budget=60_000)
        loss = narrow.accumulate(0)
        got = [p.grad.clone() for p in model.parameters()]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert narrow.budget in (30_000, 15_000, 7_500)
    model.zero_grad()
    expected = make_trainer(model, cuda, job, budget=4_000).accumulate(0)
    assert loss is not None and expected is not None and loss.loss == pytest.approx(expected.loss, rel=1e-5)
    scale = max(p.grad.abs().max() for p in model.parameters())
    assert max((a - p.grad).abs().max() for a, p in zip(got, model.parameters(), strict=True)) < 1e-4 * scale


def test_a_micro_batch_is_sent_while_the_device_works(cuda: torch.device, make_job: Callable[..., Job]) -> None:
    trainer = make_trainer(
        make_model(CONFIGS["llama"], cuda), cuda, make_job("train", "a", config={}, inputs={}), budget=4_000
    )
    trainer.work.load(0, [0])  # the first one makes the pinned memory
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # cycles: seconds
    started = time.monotonic()
    batch = trainer.work.load(0, [1])
    assert time.monotonic() - started < 0.5
    assert not torch.cuda.current_stream().query(), "the device was waited for"
    assert batch.micro.tree.block_masks, "found while the device works"
    assert batch.micro.ids_BT.cpu().tolist()[0][:600] == trainer.work.samples(0)[1].ids_T[:600].tolist()


def test_the_mask_of_a_long_sequence_is_never_held_whole(cuda: torch.device) -> None:
    small, tree = (
        Tree(
            lengths=(24, *[1_000, 500, 500] * count),
            parents=(-1, *chain(*([0, n, n] for n in range(1, 3 * count, 3)))),
            device=cuda,
        )
        for count in (2, 16)
    )
    small.make_block_masks([None])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tree.make_block_masks([None])
    assert torch.cuda.max_memory_allocated() - before < 2**27  # 32,000 x 32,000 would be 2**30 in the narrowest type
