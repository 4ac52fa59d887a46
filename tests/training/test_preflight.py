"""The preflight: what it says of a sound run, and each failure from inputs that are really broken."""

import dataclasses
import functools
import json
import mmap
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, CohereConfig, LlamaConfig

from tests.ranks import Ranks
from tests.training.test_tree import OneOff
from training import head, memory, reference, train
from training.config import Precision, Runtime
from training.data.batch import MicroBatch
from training.data.rows import RowsWriter
from training.distributed import World
from training.job import Job, write_json
from training.logprobs import Policy, choose_groups, longest_of
from training.model import find_layers, train_compiled
from training.objectives.objective import Columns, FloatArray
from training.objectives.sft import Sft
from training.preflight import passes as passes_module
from training.preflight import room
from training.preflight import run as run_module
from training.preflight.findings import FILE, Check, Report, read_report
from training.preflight.passes import Passes
from training.preflight.ready import Ready
from training.preflight.rows import trained_tokens
from training.preflight.run import check_run, make
from training.render import Rendered
from training.steps import Forwarded, Steps
from training.train import PolicyForward

VAR = {"objective": "var", "reference_factor": "mean", "batch_prompts": 4, "max_tokens": 128, "learning_rate": 1e-3}
SFT = {"objective": "sft", "responses": "all", "batch_prompts": 4, "max_tokens": 128}
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
# Positions as they come up to this one, others beyond it.
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 33,
    "short_factor": [1.0, 1.0], "long_factor": [4.0, 8.0],
}  # fmt: skip
NAMES = [
    "weights", "trained_tokens", "stop_tokens", "bos", "output_head", "unit_weights", "layout", "reference", "microbatches", "memory",
]  # fmt: skip


@pytest.fixture
def inputs(
    tmp_path: Path, tiny_policy: Path, make_row: Any, write_rows: Any, write_rewards: Any, make_job: Callable[..., Job]
) -> dict[str, Path]:
    """Nine prompts with their rewards and the reference column of the very policy."""
    rows = [make_row(f"Question {i}?", [f"Answer {'very ' * (i % 4)}long", "No"]) for i in range(9)]
    folder = write_rows(tmp_path / "rows", rows)
    rewards = write_rewards(tmp_path / "rewards", {r["row_id"]: [-float(len(a)) for a in r["responses"]] for r in rows})
    scored = make_job(
        "score_reference", "reference", config={"max_tokens": 128}, inputs={"rows": folder, "reference": tiny_policy}
    )
    reference.run(scored)
    return {"rows": folder, "base": tiny_policy, "rewards": rewards, "reference": scored.output}


@pytest.fixture
def copy_policy(tiny_policy: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the policy with another text in one of its files."""

    def copy(name: str, file: str = "", old: str = "", new: str = "") -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_policy, folder)
        if file:
            text = (folder / file).read_text()
            assert old in text
            (folder / file).write_text(text.replace(old, new))
        return folder

    return copy


def move_weights(folder: Path) -> Path:
    """Change the weights of a model where they are."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    model.save_pretrained(folder)
    return folder


def prepare(job: Job) -> Ready:
    alone = World(torch.device("cpu"))
    return train.prepare(job, train.read_config(job), Runtime.model_validate(job.runtime), alone).ready


def find(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def replace(ready: Ready, **changed: Any) -> Ready:
    """Put other parts into a run, with steps made of them."""
    parts = dataclasses.replace(ready, **changed)
    steps = Steps(parts.examples, parts.objective, parts.forward, batch_prompts=4, epochs=1, seed=0)
    return dataclasses.replace(parts, steps=steps)


def test_a_sound_run_passes_and_its_artifact_says_so(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    job = make_job("train", "a", config=VAR, inputs=inputs)
    train.run(job)
    found = json.loads((job.output / FILE).read_text())
    assert found["passed"] and [check["name"] for check in found["checks"]] == NAMES
    assert {check["outcome"] for check in found["checks"]} == {"passed"}, found["checks"]
    lines = {check["name"]: check["line"] for check in found["checks"]}
    assert "18 responses that were not cut short end with one of [1]" in lines["stop_tokens"]
    assert "1 at the start of each of 9 rows" in lines["bos"]
    summary = json.loads((job.output / "summary.json").read_text())
    assert (summary["preflight_passed"], summary["preflight_failed"]) == (10, 0)
    assert summary["microbatch_tokens"] == found["microbatch_tokens"] == 2048
    sizes = found["memory"]
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(inputs["base"]).parameters())
    assert sizes["optimiser_bytes"] == 8 * weights
    assert 0 <= sizes["peak_bytes"] < sizes["free_bytes"]  # so little may find its pages there already


def test_the_layout_is_tried_on_the_shortest_row_too_and_as_it_will_train(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    ready = prepare(make_job("train", "a", config={**SFT, "precision": "bfloat16"}, inputs=inputs))
    sizes = [max(len(sample.ids_T) for sample in example.samples) for example in ready.examples]
    groups = [example.samples for example in ready.examples]
    assert [longest_of(group) for group in choose_groups(groups)] == [min(sizes), *sorted(sizes)[-2:]]
    assert len(choose_groups(groups[:1])) == 1
    many = [Rendered(ids_T=np.arange(9 + n), start=4) for n in range(8)]
    assert [len(sample.ids_T) for sample in choose_groups([many])[0]] == [16, 15]
    assert "3 rows, the longest and the shortest" in find(check_run(ready), "layout").line


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_in_bfloat16_tries_the_layout_in_it(
    precision: str, inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    ready = prepare(make_job("train", "a", config={**SFT, "precision": precision}, inputs=inputs))
    report = check_run(dataclasses.replace(ready, policy=OneOff(ready.model)))
    failed = find(report, "layout")
    assert failed.outcome == ("failed" if precision == "bfloat16" else "passed")
    assert ("layout tree, bfloat16: " in failed.line) == (precision == "bfloat16")


def test_an_adapter_needs_room_for_its_own_moments_alone(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    ready = prepare(make_job("train", "a", config={**SFT, "lora": {"rank": 2}}, inputs=inputs))
    report = check_run(ready)
    assert not report.failures
    adapter = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
    assert report.memory["optimiser_bytes"] == 8 * adapter < sum(p.numel() for p in ready.model.parameters())


def test_nothing_is_changed(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    ready = prepare(make_job("train", "a", config=VAR, inputs=inputs))
    before = {name: p.clone() for name, p in ready.model.named_parameters()}
    state = torch.get_rng_state()
    assert not check_run(ready).failures
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in ready.model.named_parameters())


def read(job: Job) -> dict[str, Any]:
    found = json.loads((job.output / FILE).read_text())
    return {**found, "checks": [Check(**check) for check in found["checks"]]}


@pytest.fixture
def shifted(inputs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The inputs with a reference column that says it is of this model, and is not."""
    column = shutil.copytree(inputs["reference"], tmp_path / "column")
    table = pq.read_table(column / "scores.parquet")
    with RowsWriter(column / "scores.parquet", table.schema) as out:
        out.write([{**row, "logp": [value * 1.01 for value in row["logp"]]} for row in table.to_pylist()])
    return {**inputs, "reference": column}


def test_a_column_of_another_model_under_this_ones_name_fails_with_rows_and_text(
    shifted: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    told = r"1 of 10 checks failed, nothing was trained:\n  - reference: .*score the reference again\n +\w{12}  Q"
    with pytest.raises(ValueError, match=told):
        train.run(make_job("train", "a", config=VAR, inputs=shifted))


def test_a_base_of_other_weights_or_another_template_than_the_reference_is_refused(
    inputs: dict[str, Path], make_job: Callable[..., Job], copy_policy: Callable[..., Path]
) -> None:
    moved = move_weights(copy_policy("moved"))
    other = copy_policy("other", "chat_template.jinja", "{{ bos_token }}", "{{ bos_token }}the ")
    for base, what in ((moved, "other weights"), (other, "other chat template")):
        with pytest.raises(ValueError, match=f"logp_ref of a model with {what}"):
            prepare(make_job("train", "a", config=VAR, inputs={**inputs, "base": base}))


def test_a_turn_that_ends_with_a_token_nobody_stops_at_fails(
    inputs: dict[str, Path], make_job: Callable[..., Job], copy_policy: Callable[..., Path]
) -> None:
    base = copy_policy("unstopped", "tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<pad>"')
    for name in ("config.json", "generation_config.json"):
        text = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**text, "eos_token_id": 2}))
    job = make_job("train", "a", config=SFT, inputs={**inputs, "base": base})
    with pytest.raises(
        ValueError, match=r"stop_tokens: 9 of 9 rows end with token 1 \('<\|im_end\|>'\); expected one of \[2\]"
    ):
        train.run(job)


def test_a_response_cut_short_needs_no_stop_token(
    inputs: dict[str, Path], make_job: Callable[..., Job], make_row: Any, write_rows: Any, tmp_path: Path
) -> None:
    rows = [make_row(f"Question {i}?", ["A long answer", "No"], truncated=[i % 2 == 0, False]) for i in range(6)]
    inputs = {"rows": write_rows(tmp_path / "cut", rows), "base": inputs["base"]}
    report = check_run(prepare(make_job("train", "a", config=SFT, inputs=inputs)))
    assert not report.failures
    assert find(report, "stop_tokens").line.startswith("9 responses")


def test_a_bos_that_the_template_doubles_in_some_rows_fails(
    inputs: dict[str, Path],
    make_job: Callable[..., Job],
    copy_policy: Callable[..., Path],
    make_row: Any,
    write_rows: Any,
    tmp_path: Path,
) -> None:
    turn = "<|im_start|>{{ message['role'] }}\n"
    twice = "{% if loop.first and message['role'] == 'system' %}<s>{% endif %}"
    base = copy_policy("doubling", "chat_template.jinja", turn, twice + turn)
    rows = [make_row(f"Question {i}?", ["Yes", "No"]) for i in range(6)]
    rows[3]["prompt"] = [{"role": "system", "content": "Be brief."}, *rows[3]["prompt"]]
    inputs = {"rows": write_rows(tmp_path / "doubled", rows), "base": base}
    report = check_run(prepare(make_job("train", "a", config=SFT, inputs=inputs)))
    (failed,) = report.failures
    assert failed.line.startswith("1 of 6 rows begin with 2 BOS tokens ('<s>'); expected 1")
    assert failed.rows == [{"row_id": rows[3]["row_id"], "excerpt": "Question 3?"}]


class Doubled(Sft):
    """Weights that are not normalised over the global batch."""

    def weigh(self, columns: Columns) -> FloatArray:
        return 2.0 * super().weigh(columns)


class MeanLoss(Sft):
    """The loss of a micro-batch divided by its own count: the classic fault of accumulation."""

    def loss_sum(self, value_R: Tensor, weight_R: Tensor, columns: Columns) -> Tensor:
        return super().loss_sum(value_R, weight_R, columns) / len(value_R)


class LeakyForward(PolicyForward):
    """Log-probabilities that depend on what else is in the micro-batch."""

    def values(self, model: Any, micro: MicroBatch, slope_B: Any = None) -> Forwarded:
        out = super().values(model, micro, slope_B)
        return out._replace(value_B=out.value_B * (1.0 + 0.01 * len(micro.trained)))


def test_parts_that_are_broken_fail_each_in_its_check(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    ready = prepare(make_job("train", "a", config=SFT, inputs=inputs))

    def failures(**changed: Any) -> dict[str, str]:
        return {check.name: check.line for check in check_run(replace(ready, **changed)).failures}

    assert failures() == {}
    found = failures(objective=Doubled())
    assert list(found) == ["weights"] and "add up to 16; expected 8" in found["weights"]
    assert list(failures(objective=MeanLoss())) == ["unit_weights", "microbatches"]
    found = failures(forward=LeakyForward(ready.device, ready.runtime.layout))
    assert list(found) == ["microbatches"] and "depend on runtime.microbatch_tokens" in found["microbatches"]


def test_a_step_without_trained_tokens_fails(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    ready = prepare(make_job("train", "a", config=SFT, inputs=inputs))
    mute = [
        dataclasses.replace(
            example,
            samples=tuple(Rendered(ids_T=s.ids_T, start=len(s.ids_T)) for s in example.samples),
            num_tokens_K=np.zeros(len(example.samples), dtype=int),
        )
        for example in ready.examples
    ]
    broken = replace(ready, examples=mute)
    report = Report(broken.steps.digest, "", {}, 5.0, 2048)
    make(trained_tokens, broken, report)
    (failed,) = report.failures
    assert "step 0: none of its 8 responses has a trained token" in failed.line and len(failed.rows) == 3


@pytest.mark.parametrize(
    ("name", "config", "words", "rows"),
    [
        # Its attention is its own, whatever is read.
        ("layout", BloomConfig(hidden_size=16, n_layer=2, n_head=4), "set runtime.layout to rows", 0),
        ("layout", LlamaConfig(
            **SMALL, max_position_embeddings=128, rope_parameters=LONG_ROPE, initializer_range=0.5,
        ), "nats per token from those of each response alone", 3),
        ("output_head", CohereConfig(**SMALL, logit_scale=0.5), "scaled logits", 1),
    ],
)  # fmt: skip
def test_an_architecture_that_cannot_be_trained_as_asked_fails_beside_all_else_that_does(
    name: str,
    config: Any,
    words: str,
    rows: int,
    inputs: dict[str, Path],
    make_job: Callable[..., Job],
    copy_policy: Callable[..., Path],
) -> None:
    base = copy_policy(name, "tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<pad>"')
    tokenizer = AutoTokenizer.from_pretrained(base)
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = len(tokenizer), 0, 2, 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    job = make_job("train", "a", config=SFT, inputs={**inputs, "base": base})
    with pytest.raises(ValueError, match=rf"(?s)2 of 7 checks failed.*- stop_tokens: .*- {name}: .*{words}") as caught:
        train.run(job)
    shown = str(caught.value).partition(f"- {name}: ")[2].splitlines()[1:]
    assert len(shown) == rows and all(re.fullmatch(r" +[0-9a-f]{12}  Question \d\?", line) for line in shown)


@pytest.mark.parametrize("part", [0, 1])
def test_a_head_that_finds_other_numbers_than_torch_in_training_alone_fails(
    part: int, inputs: dict[str, Path], make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the log-probabilities and the gradients one is off by a percent, as code that was compiled wrong might have it."""
    sound = head.weigh_logits

    def weigh(*arguments: Any) -> Any:
        found = list(sound(*arguments))
        found[part] = 1.01 * found[part]
        return tuple(found)

    monkeypatch.setattr(head, "weigh_logits", weigh)
    job = make_job("train", "a", config=SFT, inputs=inputs)
    with pytest.raises(ValueError, match=r"(?s)1 of 7 checks failed.*- output_head: .*differ by .*0\.01"):
        train.run(job)


def limit_memory(monkeypatch: pytest.MonkeyPatch, folder: Path, free: int) -> None:
    """Lay the files of a container's limit where the kernel would have them. Files that were read are part of what is used."""
    (folder / "memory.max").write_text(f"{free + 5_000_000}\n")
    (folder / "memory.current").write_text(f"{free + 4_900_000}\n")
    cached = f"file {free - 100_000}\ninactive_file {free - 150_000}\nactive_file 50000\n"
    (folder / "memory.stat").write_text(f"anon 5000000\n{cached}")
    monkeypatch.setattr(memory, "CGROUPS", ((folder, "memory.max", "memory.current", ""),))


def test_the_limit_of_a_group_below_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm's and systemd's jobs have it: the root has none."""
    for name, free in (("", None), ("slurm", 9_000_000), ("slurm/job_7", None), ("slurm/job_8", 1_000_000)):
        (tmp_path / name).mkdir(exist_ok=True)
        if free is not None:
            limit_memory(monkeypatch, tmp_path / name, free=free)
    monkeypatch.setattr(memory, "CGROUPS", ((tmp_path, "memory.max", "memory.current", ""),))
    for path, free in (("/slurm/job_7", 9_000_000), ("/slurm/job_8", 1_000_000)):
        (tmp_path / "membership").write_text(f"12:cpu:/elsewhere\n0::{path}\n")
        monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
        assert memory.measure_free(torch.device("cpu")) == free


@pytest.mark.parametrize("text", ["{", "3", '{"plan": "x"}', "\0\0"])
def test_findings_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    assert read_report(tmp_path / FILE) is None


def test_what_does_not_fit_is_refused_before_the_kernel_ends_it(
    inputs: dict[str, Path], make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit_memory(monkeypatch, tmp_path, 300_000)
    job = make_job("train", "a", config=SFT, inputs=inputs)
    with pytest.raises(
        ValueError,
        match=r"memory: step \d, the largest micro-batch of 2 steps: \d+ tokens of 10 responses would take about .* MiB with the optimiser's state, got 0.3 MiB free; expected room",
    ):
        train.run(job)
    assert read(job)["memory"]["free_bytes"] == 300_000


def test_what_an_accelerator_has_no_time_to_try_is_held_to_its_free_memory_by_the_formula(
    inputs: dict[str, Path], make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare(make_job("train", "a", config=SFT, inputs=inputs))
    ready = dataclasses.replace(ready, world=World(torch.device("cuda")))
    monkeypatch.setattr(room, "measure_free", lambda device: 300_000)
    report = Report(ready.steps.digest, "", {}, seconds_allowed=0.0, microbatch_tokens=2048)
    passes = Passes(ready, time.monotonic(), seconds_allowed=0.0, seconds_per_token=1.0)
    make(room.memory, ready, report, report, passes)
    (failed,) = report.failures
    assert "would take about" in failed.line and "got 0.3 MiB free; expected room" in failed.line


@pytest.mark.parametrize(("tokens_per_second", "tried"), [(1e5, True), (100.0, True), (30.0, False)])
def test_a_slow_policy_is_checked_within_thirty_seconds(
    tokens_per_second: float,
    tried: bool,
    inputs: dict[str, Path],
    make_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before hours of training, by a clock that goes with the tokens of every pass: head, unit weights and layout are whole, of the first step is
    tried as much as the rest of the time goes for, and the largest micro-batch where there is time for it."""
    clock, plain = SimpleNamespace(now=0.0, monotonic=lambda: clock.now), Policy.forward

    def forward(self: Policy, compute: Callable[..., Any], *arguments: Any) -> Any:
        out, read = plain(self, compute, *arguments), arguments[0]
        if isinstance(read, MicroBatch):
            tokens = (3 if torch.is_grad_enabled() else 1) * read.num_tokens
        else:  # the model's own logits, of one response; and beside them those of its hidden states
            tokens = len(read.ids_T) if isinstance(read, Rendered) else 2 * len(read)
        clock.now += tokens / tokens_per_second
        return out

    monkeypatch.setattr(Policy, "forward", forward)
    for module in (passes_module, run_module):
        monkeypatch.setattr(module, "time", clock)
    report = check_run(prepare(make_job("train", "a", config=SFT | {"epochs": 1000}, inputs=inputs)))
    assert report.failures == [] and 0 < clock.now <= 30
    (memory_line,) = [check.line for check in report.checks if check.name == "memory"]
    assert ("not tried, as it would take about" not in memory_line) == tried


class Kept(torch.autograd.Function):
    """Keeps 200 MB for the backward pass, of pages that no freed tensor has left there."""

    @staticmethod
    def forward(ctx: Any, value_B: Tensor) -> Tensor:
        ctx.save_for_backward(torch.frombuffer(mmap.mmap(-1, 200_000_000), dtype=torch.uint8).fill_(1))
        return value_B.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        gradient: Tensor = gradients[0] * ctx.saved_tensors[0][0]
        return gradient


class HungryForward(PolicyForward):
    """The policy of an architecture that keeps more than the formula says, once gradients are asked for."""

    def values(self, model: Any, micro: MicroBatch, slope_B: Any = None) -> Forwarded:
        out = super().values(model, micro, slope_B)
        return out if out.weighted is None else out._replace(weighted=Kept.apply(out.weighted))


def test_what_the_largest_micro_batch_took_is_measured_and_held_to_what_is_free(
    inputs: dict[str, Path], make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare(make_job("train", "a", config=SFT, inputs=inputs))
    hungry = replace(ready, forward=HungryForward(ready.device, ready.runtime.layout))
    report = check_run(hungry)
    assert not report.failures and 190e6 < report.memory["peak_bytes"] < 300e6  # the kernel counts by batches of pages
    assert report.memory["estimated_bytes"] < 50e6
    (ready.job.output / FILE).unlink()
    monkeypatch.setattr(room, "measure_free", lambda device: 100_000_000)
    (failed,) = check_run(hungry).failures
    assert failed.name == "memory" and re.search(r"took 0\.19 GiB.* got 95\.4 MiB free; expected room", failed.line)


def test_the_largest_micro_batch_is_the_one_that_takes_most_and_not_that_of_the_most_tokens(
    tiny_policy: Path, tmp_path: Path, make_row: Any, write_rows: Any, make_job: Callable[..., Job]
) -> None:
    """A long prompt has more tokens, long answers more logits, three numbers of the vocabulary for each of their tokens."""
    prompt, answers = make_row("word " * 30, ["Yes", "No"]), make_row("Word?", ["word " * 10, "very " * 10])
    rows = write_rows(tmp_path / "rows", [prompt, answers])
    config = SFT | {"batch_prompts": 1}
    ready = prepare(make_job("train", "a", config=config, inputs={"rows": rows, "base": tiny_policy}))
    sizes = {}
    for step in range(2):
        samples = ready.steps.samples(step)
        sizes[ready.steps.row_ids(step)[0]] = ready.forward.size(samples, np.zeros(2, dtype=int))
    assert sizes[prompt["row_id"]].tokens > sizes[answers["row_id"]].tokens
    found = room.find_largest(ready, budget=128)
    assert ready.steps.row_ids(found.step) == [answers["row_id"]] and found.size == sizes[answers["row_id"]]
    assert (found.members, found.looked_at) == ([0, 1], 2)


def test_compiled_layers_are_held_to_plain_ones_where_they_train(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    """Code that a compiler got wrong runs where gradients are asked for alone, which no other check does."""
    for factor in (1.0, 1.01):
        ready = prepare(make_job("train", f"by-{factor}", config=SFT, inputs=inputs))
        layer = find_layers(ready.model)[0]

        def compiled(*arguments: Any, plain: Any = layer.forward, by: float = factor, **options: Any) -> Any:
            return by * plain(*arguments, **options)

        layer.forward = functools.partial(train_compiled, compiled, layer.forward)
        report = check_run(dataclasses.replace(ready, runtime=ready.runtime.model_copy(update={"compile": True})))
        assert [check.name for check in report.checks] == [*NAMES, "compiled_layers"]
        assert [check.name for check in report.failures] == ([] if factor == 1 else ["compiled_layers"])
    assert "by compiled layers and" in report.failures[0].line and len(report.failures[0].rows) == 3


class NarrowForward(PolicyForward):
    """The policy on a device with room for 100 tokens."""

    def values(self, model: Any, micro: MicroBatch, slope_B: Any = None) -> Forwarded:
        out = super().values(model, micro, slope_B)
        if torch.is_grad_enabled() and out.num_tokens > 100:
            raise torch.OutOfMemoryError(f"tried to hold {out.num_tokens} tokens")
        return out


def test_a_device_without_room_for_the_budget_gets_a_smaller_one(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    ready = prepare(make_job("train", "a", config=SFT, inputs=inputs))
    narrow = replace(ready, forward=NarrowForward(ready.device, ready.runtime.layout))
    report = check_run(narrow)
    assert not report.failures
    assert (report.microbatch_tokens, report.memory["microbatch_tokens"] <= 64) == (64, True)
    assert find(report, "memory").line.endswith("were free; for micro-batches of 2048 tokens there was no room")


def test_passes_over_the_first_step_read_no_more_at_once_than_training_will(
    tiny_policy: Path,
    tmp_path: Path,
    make_row: Any,
    write_rows: Any,
    make_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt with forty responses goes through in as many passes as its micro-batches."""
    rows = write_rows(tmp_path / "forty", [make_row("Which?", [f"Answer {n}" for n in range(40)])])
    values, read_tokens = PolicyForward.values, []

    def note(self: PolicyForward, model: Any, micro: MicroBatch, slope_B: Any = None) -> Forwarded:
        read_tokens.append(micro.ids_BT.numel())
        return values(self, model, micro, slope_B)

    monkeypatch.setattr(PolicyForward, "values", note)
    job = make_job("train", "a", config=SFT, inputs={"rows": rows, "base": tiny_policy}, microbatch_tokens=128)
    report = check_run(prepare(job))
    assert {check.name: check.outcome for check in report.checks}["microbatches"] == "passed" and not report.failures
    assert len(read_tokens) > 4 and max(read_tokens) <= 128


def test_an_attempt_that_goes_on_checks_no_second_time_unless_something_else_is_asked(
    inputs: dict[str, Path], make_job: Callable[..., Job], copy_policy: Callable[..., Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def check(budget: int, **changes: Any) -> tuple[Report, int]:
        report = check_run(
            prepare(make_job("train", "a", config=SFT | changes, inputs=inputs, microbatch_tokens=budget))
        )
        return report, capsys.readouterr().err.count("preflight: weights passed")

    first, made = check(128)
    assert first.passed and first.microbatch_tokens == 128 and made == 1
    assert check(128) == (first, 0)
    other, made = check(64)
    assert other.passed and other.microbatch_tokens == 64 and made == 1
    assert check(64) == (other, 0)
    narrow, made = check(64, precision="bfloat16")  # the same steps, by other numbers
    assert narrow.passed and narrow.plan == other.plan and made == 1
    inputs["base"] = move_weights(copy_policy("moved"))
    moved, made = check(64, precision="bfloat16")
    assert moved.passed and moved.plan == narrow.plan and made == 1


def test_the_job_preflight_tells_what_it_found_and_trains_nothing(shifted: dict[str, Path], tmp_path: Path) -> None:
    write_json(tmp_path / "job.json", {
        "job": "preflight", "config": VAR, "runtime": {"device": "cpu", "threads": 1},
        "inputs": {name: str(path) for name, path in shifted.items()},
        "output": str(tmp_path / "o"), "work": str(tmp_path / "w"),
    })  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "training", str(tmp_path / "job.json")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [
        line.split(":")[1].split()[0] for line in done.stderr.splitlines() if line.startswith("preflight:")
    ] == NAMES
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["preflight_failed"] == 1
    assert {path.name for path in (tmp_path / "o").iterdir()} == {FILE, "summary.json"}


class LookingForward(PolicyForward):
    """The policy, with a look at what the parent could read if the process were killed in the backward pass to come."""

    file: Path
    seen: dict[str, Any]

    def values(self, model: Any, micro: MicroBatch, slope_B: Any = None) -> Forwarded:
        out = super().values(model, micro, slope_B)
        if torch.is_grad_enabled():
            self.seen = json.loads(self.file.read_text())
        return out


def test_what_is_known_of_memory_is_on_disk_before_it_is_tried(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    job = make_job("train", "a", config=SFT, inputs=inputs)
    ready = prepare(job)
    forward = LookingForward(ready.device, ready.runtime.layout)
    forward.file = job.output / FILE
    assert check_run(replace(ready, forward=forward)).passed
    assert forward.seen["passed"] is False  # so a rerun makes the checks again
    assert forward.seen["memory"].keys() == {"microbatch_tokens", "free_bytes", "estimated_bytes", "optimiser_bytes"}


def check_on(world: World, job: dict[str, Any], runtime: Runtime) -> tuple[Report, bool]:
    """Return the findings of this rank, and whether it is as before: sharded, without gradients, with its random state."""
    ready = train.prepare(Job(**job), train.read_config(Job(**job)), runtime, world).ready
    state = torch.get_rng_state()
    report = check_run(ready)
    same = all(isinstance(p, DTensor) and p.grad is None for p in ready.policy.parameters())
    return report, same and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("column", ["inputs", "shifted"])
def test_ranks_come_to_the_findings_of_one(
    column: str, precision: Precision, request: pytest.FixtureRequest, make_job: Callable[..., Job], ranks: Ranks
) -> None:
    """Sound or with a foreign column, and once more when an attempt goes on."""
    given: dict[str, Path] = request.getfixturevalue(column)
    config = {**VAR, "precision": precision.value}
    alone = check_run(prepare(make_job("train", "alone", config=config, inputs=given)))
    both = make_job("train", "both", config=config, inputs=given)
    job = {name: getattr(both, name) for name in ("name", "config", "runtime", "inputs", "output", "work")}
    runtime = Runtime.model_validate(both.runtime)
    found = ranks.run(check_on, size=2, job=job, runtime=runtime)
    for report, same in found:
        assert same
        assert [(c.name, c.outcome) for c in report.checks] == [(c.name, c.outcome) for c in alone.checks]
        assert report.memory == found[0][0].memory and report.seconds_allowed == found[0][0].seconds_allowed
    told = json.loads((both.output / FILE).read_text())
    assert told["passed"] == alone.passed and told["memory"]["optimiser_bytes"] == alone.memory["optimiser_bytes"] / 2
    if alone.passed:
        (first, _), (second, _) = ranks.run(check_on, size=2, job=job, runtime=runtime)
        assert first.checks and not second.checks, "the first rank's are those of before"
        assert first.microbatch_tokens == second.microbatch_tokens == 2048


def check_beside(world: World, free: int, job: dict[str, Any], runtime: Runtime) -> Report:
    """Return the findings of this rank where the first machine has so many bytes free, and the others enough."""
    ready = train.prepare(Job(**job), train.read_config(Job(**job)), runtime, world).ready
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "measure_free", lambda device: free if world.is_first else 2**40)
        patch.setattr(room, "share_of_free", lambda ready: 2**40)
        return check_run(ready)


def test_ranks_whose_model_the_first_machine_could_not_put_together_are_refused(
    inputs: dict[str, Path], make_job: Callable[..., Job], ranks: Ranks
) -> None:
    model = AutoModelForCausalLM.from_pretrained(inputs["base"])
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    both = make_job("train", "both", config=SFT, inputs=inputs)
    job = {name: getattr(both, name) for name in ("name", "config", "runtime", "inputs", "output", "work")}
    runtime = Runtime.model_validate(both.runtime)
    for free in (needed, needed - 1):
        (both.output / FILE).unlink(missing_ok=True)
        for report in ranks.run(check_beside, size=2, free=free, job=job, runtime=runtime):
            told = [failed.line for failed in report.failures]
            assert not told if free == needed else "put together in the first machine's memory to be written" in told[0]
