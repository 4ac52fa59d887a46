"""A policy over several ranks: read in parts, trained as on one rank, stopped together, resumed on any number."""

import dataclasses
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_module
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.architectures import CONFIGS, VOCABULARY, make_model
from tests.ranks import Ranks
from tests.training.test_logprobs import make_samples
from tests.training.test_loop import Line, settings
from training import distributed, sharding
from training.config import LoraConfig, Precision, Runtime
from training.data.batch import collate
from training.data.schema import SCHEMA
from training.distributed import ALONE, World, open_world, own_gpu, require_size
from training.head import CHUNK_ELEMENTS
from training.job import Interrupted, Job
from training.logprobs import Policy, sum_logps
from training.loop import make_optimiser, run_steps
from training.model import load_policy
from training.objectives.sft import SftConfig
from training.sharding import gather_weights, load_sharded_policy, shard_policy
from training.train import prepare, train

CONFIG = SftConfig(responses="all", batch_prompts=4, epochs=4, max_tokens=96, learning_rate=1e-3)


def read_policy(world: World, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return the gathered weights, the buffers, and how many numbers this rank holds itself. None is made before it is a part."""
    shard, made = sharding.shard_policy, set[str]()

    def note(policy: Policy, *arguments: Any, **options: Any) -> Any:
        made.update(parameter.device.type for parameter in policy.parameters())
        return shard(policy, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "shard_policy", note)
        policy, _ = load_sharded_policy(folder, world, precision=Precision.float32)
    assert made == {"meta"}
    held = sum(p.to_local().numel() for p in policy.parameters())  # type: ignore[attr-defined]
    return gather_weights(policy.model, world), dict(policy.model.named_buffers()), held


@pytest.fixture(scope="module")
def tied_policy(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, bfloat16, several files, as larger models come."""
    folder = tmp_path_factory.mktemp("tied")
    shutil.copytree(tiny_policy, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def base_policy(tied_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the base model alone, whose names lack the prefix."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(tied_policy, folder, dirs_exist_ok=True)
    for path in folder.glob("model*"):
        path.unlink()
    state = AutoModelForCausalLM.from_pretrained(tied_policy).model.state_dict()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("name", "size"), [("tiny_policy", 2), ("tied_policy", 4), ("base_policy", 3)])
def test_parts_are_read_as_the_whole_is(name: str, size: int, request: pytest.FixtureRequest, ranks: Ranks) -> None:
    folder: Path = request.getfixturevalue(name)
    model, _ = load_policy(folder, precision=Precision.float32, device=ALONE.device)
    (weights, buffers, _), *others = results = ranks.run(read_policy, size=size, folder=folder)
    expected = model.state_dict()
    assert weights.keys() == expected.keys() and not any(other[0] for other in others)
    assert all(torch.equal(weights[n], t) and weights[n].dtype == t.dtype for n, t in expected.items())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffers[n], t) for n, t in model.named_buffers())
    held = [held for _, _, held in results]
    assert sum(held) == sum(p.numel() for p in model.parameters()) and max(held) < 0.6 * sum(held)


def refuse_policy(world: World, folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_sharded_policy(folder, world, precision=Precision.float32)
    return str(caught.value)


def test_a_tensor_that_is_not_there_is_named(tiny_policy: Path, tmp_path: Path, ranks: Ranks) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weights"] = state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for message in ranks.run(refuse_policy, size=2, folder=folder):
        assert "1 tensors of llama are not in its files" in message and "first: lm_head.weight)" in message
        assert message.endswith("or set runtime.ranks to 1")


def test_an_embedding_and_a_head_that_are_to_be_one_and_differ_are_refused_on_any_number_of_ranks(
    tied_policy: Path, tmp_path: Path, ranks: Ranks
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied_policy)
    state = {
        name: tensor.clone() for name, tensor in model.state_dict().items()
    }  # both names, as some programs write them
    folder = tmp_path / "both"
    shutil.copytree(tied_policy, folder)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    load_policy(folder, precision=Precision.float32, device=torch.device("cpu"))
    assert len(ranks.run(read_policy, size=2, folder=folder)[0][0]) == len(state)

    state["lm_head.weight"][-1, -1] += 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="an embedding and an output head that differ; expected one for both"
    ) as caught:
        load_policy(folder, precision=Precision.float32, device=torch.device("cpu"))
    assert ranks.run(refuse_policy, size=2, folder=folder) == [str(caught.value)] * 2


@pytest.fixture
def make_train_job(tmp_path: Path, train_inputs: dict[str, str]) -> Callable[..., Job]:
    inputs = {name: Path(path) for name, path in train_inputs.items()}

    def make(name: str) -> Job:
        folder = tmp_path / name
        for part in ("output", "work"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        return Job("train", {}, {}, inputs, output=folder / "output", work=folder / "work")

    return make


def run_job(
    world: World,
    output: Path,
    work: Path,
    inputs: dict[str, Path],
    stop_after: int | None = None,
    config: SftConfig = CONFIG,
) -> str:
    """Run a job on this rank; with `stop_after` the last rank alone is told to stop once so many steps are told of."""
    job = Job("train", {}, {}, inputs, output=output, work=work)

    def stop() -> None:
        metrics = output / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < (stop_after or 0):
            time.sleep(0.001)
        job.stop.set()

    if stop_after is not None and world.rank == world.size - 1:
        threading.Thread(target=stop, daemon=True).start()
    try:
        train(job, config, Runtime(microbatch_tokens=64, checkpoint_every_steps=3), world)
    except Interrupted:
        return "stopped"
    return "done"


def run_on(ranks: Ranks, size: int, job: Job, *, replicas: int = 1, **options: Any) -> set[str]:
    arguments = {"output": job.output, "work": job.work, "inputs": job.inputs, **options}
    if size == 1:
        return {run_job(ALONE, **arguments)}
    return set(ranks.run(run_job, size=size, replicas=replicas, **arguments))


MEASURED = (
    "time", "train/tokens_per_second", "train/tflops_per_second", "train/flop_share", "train/memory_gib", "train/peak_memory_gib",
)  # fmt: skip


def read_figures(job: Job) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def count_step_tokens(job: Job, config: Any, *, ranks: int) -> list[int]:
    """Return what goes through the policy in each step that so many ranks share: what prompts share is read once a micro-batch."""
    ready = prepare(job, config, Runtime(microbatch_tokens=64), ALONE).ready
    return [
        sum(
            ready.forward.size(
                [ready.steps.samples(step)[n] for n in part], ready.steps.columns(step).group_R[part]
            ).tokens
            for part in ready.steps.cut(step, budget=64, ranks=ranks)
        )
        for step in range(ready.steps.num_steps)
    ]


def assert_tokens(job: Job, config: Any, *, ranks: tuple[int, int]) -> None:
    """To the token, of a run that went on on so many ranks after so many, at whatever step that was."""
    first, second = (count_step_tokens(job, config, ranks=size) for size in ranks)
    possible = {sum(first[:step]) + sum(second[step:]) for step in range(len(first) + 1)}
    assert json.loads((job.output / "summary.json").read_text())["tokens"] in possible


def assert_same_result(job: Job, expected: Job, *, ranks: tuple[int, int], config: Any = CONFIG) -> None:
    """Files by name, configuration and tokenizer to the byte, weights and figures to what order of summing may do."""
    files, got_files = ({p.name for p in j.output.iterdir()} for j in (expected, job))
    assert got_files == files
    for path in map(expected.output.joinpath, files):
        if path.suffix in (".jinja", ".parquet") or (
            path.suffix == ".json" and path.name not in ("summary.json", "preflight.json")
        ):
            assert (job.output / path.name).read_bytes() == path.read_bytes(), path.name
    got, wanted = (load_file(j.output / "model.safetensors") for j in (job, expected))
    assert got.keys() == wanted.keys()
    assert max((got[n] - t).abs().max().item() for n, t in wanted.items()) < 1e-5
    for line, wanted_line in zip(read_figures(job), read_figures(expected), strict=True):
        assert line == pytest.approx(wanted_line, rel=1e-4, abs=1e-6)
    summary, wanted_summary = (json.loads((j.output / "summary.json").read_text()) for j in (job, expected))
    assert_tokens(job, config, ranks=ranks)
    for name in ("steps", "rows", "plan", "dropped", "skipped_steps"):
        assert summary[name] == wanted_summary[name]
    if (expected.output / "adapter").exists():
        got, wanted = (load_file(j.output / "adapter" / "adapter_model.safetensors") for j in (job, expected))
        assert got.keys() == wanted.keys()
        assert max((got[n] - t).abs().max().item() for n, t in wanted.items()) < 1e-5


def test_a_job_on_ranks_gives_the_model_of_one(make_train_job: Callable[..., Job], ranks: Ranks) -> None:
    alone, both = make_train_job("alone"), make_train_job("both")
    assert run_on(ranks, 1, alone) == run_on(ranks, 2, both) == {"done"}
    assert_same_result(both, alone, ranks=(2, 2))


def test_a_tied_policy_on_ranks_is_exported_as_one_and_its_held_out_loss_is_that_of_one(
    make_train_job: Callable[..., Job], tmp_path: Path, ranks: Ranks
) -> None:
    jobs = [make_train_job(name) for name in ("alone", "both", "all")]
    base, rows = tmp_path / "tied", tmp_path / "split"
    shutil.copytree(jobs[0].inputs["base"], base)
    shutil.copytree(jobs[0].inputs["rows"], rows)
    table = pq.read_table(rows / "rows.parquet").to_pylist()
    split = [row | {"split": "heldout" if n < 3 else "train"} for n, row in enumerate(table)]
    pq.write_table(pa.Table.from_pylist(split, schema=SCHEMA), rows / "rows.parquet")
    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    for size, job in zip((1, 2, 4), jobs, strict=True):
        job = dataclasses.replace(job, inputs=job.inputs | {"base": base, "rows": rows})
        assert run_on(ranks, size, job) == {"done"}
        assert "lm_head.weight" not in load_file(job.output / "model.safetensors")
        assert_same_result(job, jobs[0], ranks=(size, size))
    assert "heldout/loss" in read_figures(jobs[0])[-1]


def test_a_job_stopped_on_two_ranks_goes_on_on_any_number(make_train_job: Callable[..., Job], ranks: Ranks) -> None:
    """All stop at the same step though only one was told, and a checkpoint knows nothing of how many wrote it."""
    whole, stopped = make_train_job("whole"), make_train_job("stopped")
    assert run_on(ranks, 2, whole) == {"done"}
    assert run_on(ranks, 2, stopped, stop_after=4) == {"stopped"}
    (checkpoint,) = (stopped.work / "checkpoints").iterdir()
    assert len(list((checkpoint / "tensors").iterdir())) == 2
    assert checkpoint.name >= "step-00000004" and not (stopped.output / "summary.json").exists()
    for size in (1, 2, 4):
        job = make_train_job(f"resumed{size}")
        for part in ("output", "work"):
            shutil.copytree(stopped.output.parent / part, job.output.parent / part, dirs_exist_ok=True)
        assert run_on(ranks, size, job) == {"done"}
        assert_same_result(job, whole, ranks=(2, size))
        if size == 2:
            assert (job.output / "model.safetensors").read_bytes() == (whole.output / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=2, alpha=8)], ids=["whole", "adapter"])
def test_two_replicas_of_two_are_stopped_and_go_on_on_other_ranks(
    lora: LoraConfig, make_train_job: Callable[..., Job], ranks: Ranks
) -> None:
    """The checkpoint, of the whole model or an adapter alone, does not tell replicas from one rank."""
    config = CONFIG.model_copy(update={"lora": lora, "epochs": 2})
    alone, uncut, stopped = (make_train_job(name) for name in ("alone", "uncut", "stopped"))
    assert run_on(ranks, 1, alone, config=config) == run_on(ranks, 4, uncut, config=config, replicas=2) == {"done"}
    assert_same_result(uncut, alone, ranks=(4, 4), config=config)
    assert run_on(ranks, 4, stopped, config=config, replicas=2, stop_after=3) == {"stopped"}
    for size, replicas in ((1, 1), (3, 1), (4, 2)):
        job = make_train_job(f"resumed-{size}")
        for part in ("output", "work"):
            shutil.copytree(stopped.output.parent / part, job.output.parent / part, dirs_exist_ok=True)
        assert run_on(ranks, size, job, config=config, replicas=replicas) == {"done"}
        assert_same_result(job, uncut, ranks=(4, size), config=config)
    assert (job.output / "model.safetensors").read_bytes() == (uncut.output / "model.safetensors").read_bytes()


def replicate(world: World) -> list[str]:
    """Give the loop a policy that each rank holds whole, as is, replicated, and sharded over another mesh; return what it says."""
    job = Job("train", {}, {}, {}, output=Path(), work=Path())
    said = []
    for placed in ("whole", "replicated", "elsewhere"):
        policy = Policy(make_model("llama"))
        if placed == "replicated":
            distribute_module(policy, world.mesh)
        elif placed == "elsewhere":
            other = init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("replicate", "shard"))
            shard_policy(policy, dataclasses.replace(world, mesh=other), precision=Precision.float32)
        with pytest.raises(AssertionError) as caught:
            run_steps(policy, Line(1), settings(), job=job, runtime=Runtime(), identity={}, world=world)
        said.append(str(caught.value))
    return said


def test_a_policy_that_every_rank_holds_whole_is_not_trained(ranks: Ranks) -> None:
    """It would come to the same numbers, so nothing else would show it."""
    for whole, replicated, elsewhere in ranks.run(replicate, size=2):
        assert re.match(
            r"parameter model\.\S+: got \(None, None\) as mesh and placements, expected \(DeviceMesh", whole
        )
        assert "(Replicate(),)) as mesh" in replicated and "(Replicate(), Shard(dim=0))) as mesh" in elsewhere
        assert all(said.endswith(", (Shard(dim=0),))") for said in (whole, replicated, elsewhere))


def test_a_job_on_fewer_ranks_than_it_asks_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def join(runtime: Runtime) -> None:
        with open_world(runtime, ALONE.device):
            pass

    with pytest.raises(ValueError, match=r"runtime.ranks: got 1 ranks, expected 2 \(1 machines of 2\); start the job"):
        join(Runtime(ranks=2))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What a launcher that was told of one process sets.
    launched = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    try:
        with pytest.raises(ValueError, match=r"got 1 ranks, expected 4 \(1 machines of 4\)"):
            join(Runtime(ranks=4, threads=1))
    finally:
        dist.destroy_process_group()


def test_one_rank_has_no_replicas() -> None:
    with pytest.raises(ValueError, match=r"runtime.replicas: got 2 for 1 ranks"):
        require_size(1, Runtime(replicas=2))


def test_more_ranks_than_gpus_are_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(
        ValueError, match=rf"rank {count} of this machine has no GPU, torch sees {count}; .*lower runtime"
    ):
        own_gpu(count)


def read_timeouts(world: World) -> set[timedelta]:
    assert world.mesh is not None
    groups = [world.mesh.get_group(dim) for dim in range(world.mesh.ndim)]
    assert [group.size() for group in groups] == [2, 2]
    return {group._get_backend(world.device).options._timeout for group in groups}


def test_no_exchange_between_replicas_or_parts_waits_longer_than_one_of_all(ranks: Ranks) -> None:
    assert ranks.run(read_timeouts, size=4, replicas=2) == [{distributed.TIMEOUT}] * 4


def test_replicas_must_divide_the_ranks(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"runtime.replicas: got 2 for 3 ranks; expected a divisor"):
        ranks.run(refuse_policy, size=3, replicas=2, folder=Path())


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def read_families(world: World) -> dict[str, tuple[Tensor, dict[str, Tensor], dict[str, float]]]:
    """Return of every family log-probabilities in chunks of three positions, gradients, and the weight decay by name."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_ELEMENTS, "cpu", 3 * VOCABULARY)
        for name in CONFIGS:
            policy = Policy(make_model(name, dtype=torch.float64))
            if world.size > 1:
                shard_policy(policy, world, precision=Precision.float32)
                assert all(isinstance(p, DTensor) for p in policy.parameters())
            logp_B = sum_logps(policy, collate(make_samples(), device=world.device))
            share_B = logp_B * torch.tensor([0.3, 2.0, 0.0, 1.7], dtype=torch.float64) / world.size
            share_B.sum().backward()
            gradients = {n: whole(p.grad) for n, p in policy.named_parameters() if p.grad is not None}
            groups = make_optimiser(policy, settings(weight_decay=0.3)).param_groups
            decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
            found[name] = logp_B.detach(), gradients, {n: decay[id(p)] for n, p in policy.named_parameters()}
    return found


def test_every_family_is_sharded_to_the_same_log_probabilities_gradients_and_decay(ranks: Ranks) -> None:
    """Tied and untied heads, biases, capped logits. Matrices decay, embeddings among them; norms and biases do not."""
    alone = read_families(ALONE)
    for size, replicas in ((2, 1), (4, 2)):
        for found in ranks.run(read_families, size=size, replicas=replicas):
            for name, (logp_B, gradients, decay) in alone.items():
                got_B, got_gradients, got_decay = found[name]
                # Norms compute in float32, in an order that the shape of the batch decides, not the ranks.
                assert torch.allclose(got_B, logp_B, rtol=0, atol=1e-9), name
                assert got_gradients.keys() == gradients.keys() and len(gradients) == len(decay)
                for parameter, gradient in gradients.items():
                    bound = 1e-9 * max(1.0, gradient.abs().max().item())
                    assert torch.allclose(got_gradients[parameter], gradient, rtol=0, atol=bound), (name, parameter)
                assert got_decay == decay
    for name, (_, _, decay) in alone.items():
        still = {parameter for parameter, share in decay.items() if share == 0.0}
        assert still and all("norm" in p or "ln_" in p or p.endswith(".bias") for p in still), name
        assert not [p for p in decay if p not in still and ("norm" in p or "ln_" in p or p.endswith(".bias"))], name
        assert any("embed" in p or "wte" in p for p in decay.keys() - still), name
        assert set(decay.values()) == {0.0, 0.3}
