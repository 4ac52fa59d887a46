"""Checkpoints: a run killed anywhere ends with the same bits, and a checkpoint of another run is refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.ranks import Ranks
from training import checkpoint, reference, train
from training.checkpoint import Progress, read_rng, restore_checkpoint, save_checkpoint
from training.distributed import World
from training.job import EXIT_INTERRUPTED, Job

SLOW_SECONDS = 8.0
IDENTITY = {"config": {"lambda_": 1.0}, "plan": "abc"}
CPU = torch.device("cpu")
SHARD = "tensors/shard-00001-model-00001-of-00001.safetensors"


def make_trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        model(torch.randn(8, 3)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model, optimiser


def make_progress(step: int) -> Progress:
    """Return progress of which every number is another, and none the default."""
    return Progress(
        step=step,
        metrics_bytes=17,
        loss=0.5,
        skipped=5,
        skipped_rows=["a", "b"],
        skipped_in_row=2,
        tokens=9,
        flops=11,
        seconds=1.5,
        microbatch_tokens=13,
        microbatch_tokens_asked=26,
    )


def save(folder: Path, *, step: int, identity: dict[str, Any] = IDENTITY) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimiser = make_trained()
    progress = make_progress(step)
    save_checkpoint(folder, model=model, optimiser=optimiser, progress=progress, rng=read_rng(CPU), identity=identity)
    return model, optimiser


def restore(folder: Path, *, identity: dict[str, Any] = IDENTITY) -> tuple[nn.Module, torch.optim.Optimizer, Progress]:
    torch.manual_seed(99)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    progress = restore_checkpoint(folder, model=model, optimiser=optimiser, identity=identity)
    return model, optimiser, progress


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimiser = save(tmp_path, step=3)
    expected_draw = torch.randn(4)
    again, other, progress = restore(tmp_path)
    assert torch.equal(torch.randn(4), expected_draw)
    assert progress == make_progress(3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    batch = torch.randn(8, 3)
    for net, stepper in ((model, optimiser), (again, other)):
        net(batch).square().sum().backward()
        stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_newest_wins_and_the_older_is_deleted(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step=step)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000009"]
    (tmp_path / "step-00000011.partial").mkdir()  # killed while writing
    assert restore(tmp_path)[2].step == 9
    save(tmp_path / "other", step=7)
    # As one leaves it that was killed before it deleted it.
    (tmp_path / "other" / "step-00000007").rename(tmp_path / "step-00000007")
    (tmp_path / "other").rmdir()
    assert restore(tmp_path)[2].step == 9
    save(tmp_path, step=12)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000012"]


def test_nothing_but_safetensors_and_json(tmp_path: Path) -> None:
    save(tmp_path, step=1)
    folder = tmp_path / "step-00000001"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {SHARD, "rng.safetensors", "state.json"}
    stored = load_file(folder / SHARD)  # as anything else reads safetensors
    assert {"0.weight", "0.weight|exp_avg", "1.running_mean"} < stored.keys()


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert restore(tmp_path / "none")[2] == Progress()


def test_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    save(tmp_path, step=1)
    with pytest.raises(ValueError, match=r'another run \(plan: got "abc", expected "xyz"\)'):
        restore(tmp_path, identity={**IDENTITY, "plan": "xyz"})
    with pytest.raises(
        ValueError,
        match=r"another run \(config.beta: got nothing, expected 0.1; config.lambda_: got 1.0, expected 2.0\)",
    ):
        restore(tmp_path, identity={**IDENTITY, "config": {"lambda_": 2.0, "beta": 0.1}})


def test_a_checkpoint_of_this_step_stays_as_it_is(tmp_path: Path) -> None:
    """A run that is stopped within the step after it, or saves twice: it is the only one, and nothing may happen to it."""
    save(tmp_path, step=3)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    save(tmp_path, step=3)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half deleted one under its name would be taken for whole. What a killed save left may have its other name."""
    save(tmp_path, step=1)
    (tmp_path / "step-00000001.partial" / "tensors").mkdir(parents=True)
    deleted: list[str] = []
    delete = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (deleted.append(path.name), delete(path, **options)))
    save(tmp_path, step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    assert deleted == ["step-00000001.partial", "step-00000001.partial"]


def test_what_a_killed_save_left_makes_room_for_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another step: with the last checkpoint and a new one there is no room for a third."""
    save(tmp_path, step=1)
    (tmp_path / "step-00000002.partial" / "tensors").mkdir(parents=True)
    write, there = checkpoint.write_tensors, list[str]()
    monkeypatch.setattr(
        checkpoint, "write_tensors", lambda *a: (there.extend(sorted(p.name for p in tmp_path.iterdir())), write(*a))
    )
    save(tmp_path, step=3)
    assert there == ["step-00000001", "step-00000003.partial"]


def save_and_tell(world: World, folder: Path) -> list[str]:
    """Save a sharded model; return the files that this rank flushed, whole at that time, and the folders."""
    flushed: list[str] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        flushed.append(f"{path.relative_to(folder)} {path.stat().st_size if path.is_file() else ''}".strip())
        sync(descriptor)

    model, optimiser = make_trained()
    if world.size > 1:
        fully_shard(model, mesh=world.mesh)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        save_checkpoint(
            folder,
            model=model,
            optimiser=optimiser,
            progress=Progress(step=1),
            rng=read_rng(CPU),
            identity={},
            world=world,
        )
    return flushed


@pytest.mark.parametrize("size", [1, 2])
def test_each_rank_flushes_what_it_wrote_and_to_the_end(tmp_path: Path, ranks: Ranks, size: int) -> None:
    """The first rank alone would keep the others waiting; torch's writer leaves the end of each file in a buffer."""
    flushed = ranks.run(save_and_tell, size=size, folder=tmp_path)
    partial, final = "step-00000001.partial", tmp_path / "step-00000001"
    for rank, paths in enumerate(flushed):
        own = {f"tensors/{path.name}" for path in (final / "tensors").glob(f"shard-{rank + 1:05d}-*")}
        assert own and {f"{partial}/{name} {(final / name).stat().st_size}" for name in own} <= set(paths)
        assert not [path for path in paths if "/shard-" in path and f"/shard-{rank + 1:05d}-" not in path]
    others = {
        f"{partial}/rng.safetensors {(final / 'rng.safetensors').stat().st_size}",
        f"{partial}/tensors",
        partial,
        ".",
    }
    assert others <= set(flushed[0])


def save_slowly(world: World, folder: Path) -> float:
    """Save a sharded model where rank 1 is slow to write its tensors and the first rank to publish; return the seconds it took."""
    sync = os.fsync
    slow = {0: "/tensors", 1: ".safetensors"}[world.rank]

    def slow_sync(descriptor: int) -> None:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith(slow):
            time.sleep(SLOW_SECONDS)
        sync(descriptor)

    model, _ = make_trained()
    fully_shard(model, mesh=world.mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", slow_sync)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SLOW_SECONDS / 2))
        what = {"model": model, "optimiser": optimiser, "progress": Progress(step=1), "rng": read_rng(CPU)}
        save_checkpoint(folder, **what, identity={}, world=world)  # type: ignore[arg-type]
    restore_checkpoint(folder, model=model, optimiser=optimiser, identity={}, world=world)
    return time.monotonic() - started


def test_ranks_wait_longer_for_each_others_files_than_within_a_step(tmp_path: Path, ranks: Ranks) -> None:
    """The disk takes twice as long, and more, as they wait for anything else."""
    assert min(ranks.run(save_slowly, size=2, folder=tmp_path)) > 2 * SLOW_SECONDS
    assert (tmp_path / "step-00000001").is_dir()


@pytest.mark.parametrize("name", [SHARD, "rng.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    save(tmp_path, step=1)
    path = tmp_path / "step-00000001" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"step-00000001: damaged .*delete it to start over"):
        restore(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: {**state, "progress": state["progress"] | {"step": 3}}, "state.json is of step 3"),
        (lambda state: {name: value for name, value in state.items() if name != "shards"}, "no 'shards' in state.json"),
        (lambda state: {**state, "progress": {"stop": 1}}, "unexpected keyword argument 'stop'"),
    ],
)
def test_a_state_of_something_else_is_damage_too(tmp_path: Path, change: Any, why: str) -> None:
    save(tmp_path, step=1)
    path = tmp_path / "step-00000001" / "state.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    (tmp_path / "step-abc").mkdir()
    with pytest.raises(ValueError, match=rf"step-00000001: damaged \(.*{why}\); delete it"):
        restore(tmp_path)


def test_a_bit_that_the_disk_has_changed_is_damage(tmp_path: Path) -> None:
    save(tmp_path, step=1)
    assert sorted(path.name for path in (tmp_path / "step-00000001").iterdir()) == [
        "rng.safetensors",
        "state.json",
        "tensors",
    ]
    path = tmp_path / "step-00000001" / SHARD
    data = bytearray(path.read_bytes())
    data[-9] ^= 1  # of a number, far behind what describes them
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"step-00000001: damaged \(what is in shard-00001.* is not what was written\); delete it"
    ):
        restore(tmp_path)


def test_large_states_go_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    model, optimiser = save(tmp_path, step=1)
    files = list((tmp_path / "step-00000001" / "tensors").iterdir())
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 1500
    again, other, _ = restore(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert all(torch.equal(optimiser.state[ours][kind], t) for kind, t in other.state[theirs].items())


def test_a_missing_file_of_tensors_is_named(tmp_path: Path) -> None:
    """The part of another rank, which nothing else would miss."""
    save(tmp_path, step=1)
    (tmp_path / "step-00000001" / SHARD).unlink()
    with pytest.raises(ValueError, match=r"damaged \(files of tensors are \{\}, expected \{'shard-00001"):
        restore(tmp_path)


def test_a_full_disk_is_said_as_such(tmp_path: Path) -> None:
    """torch wraps what fails in a checkpoint into something that is no Exception."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    save(tmp_path, step=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert restore(tmp_path)[2].step == 1


SFT = {"objective": "sft", "responses": "all"}


def write_job(folder: Path, inputs: dict[str, str], objective: dict[str, str] = SFT, *, threads: int = 1) -> Path:
    folder.mkdir()
    config = {**objective, "batch_prompts": 4, "epochs": 4, "max_tokens": 96, "learning_rate": 1e-3}
    runtime = {"device": "cpu", "threads": threads, "microbatch_tokens": 64, "checkpoint_every_steps": 3}
    raw = {"job": "train", "config": config, "runtime": runtime, "inputs": inputs}
    (folder / "job.json").write_text(
        json.dumps({**raw, "output": str(folder / "output"), "work": str(folder / "work")})
    )
    return folder / "job.json"


def start(job_file: Path, *, within: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with (job_file.parent / "log").open("ab") as log:
        return subprocess.Popen(
            [*within, sys.executable, "-m", "training", str(job_file)], env=environment, stdout=log, stderr=log
        )


def interrupt(job_file: Path, number: int, *, after_steps: int) -> int:
    """Start the job, send the signal once the metrics tell of `after_steps` steps, return the exit status."""
    child = start(job_file)
    metrics = job_file.parent / "output" / "metrics.jsonl"
    while child.poll() is None and (not metrics.is_file() or metrics.read_bytes().count(b"\n") < after_steps):
        time.sleep(0.002)
    child.send_signal(number)
    return child.wait()


def read_figures(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics without what is measured: by the clock, and of the process's memory."""
    lines = [json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]
    measured = (
        "time",
        "train/tokens_per_second",
        "train/tflops_per_second",
        "train/flop_share",
        "train/memory_gib",
        "train/peak_memory_gib",
    )
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary without what depends on the clock."""
    summary = json.loads((folder / "output" / "summary.json").read_text())
    measured = ("wall_seconds", "tokens_per_second", "preflight_seconds", "preflight_peak_bytes", "flop_share")
    return {k: v for k, v in summary.items() if k not in measured}


@pytest.fixture
def scored_inputs(tmp_path: Path, train_inputs: dict[str, str], write_rewards: Any, make_job: Any) -> dict[str, str]:
    """The inputs of a training on rewards and reference log-probabilities."""
    paths = {name: Path(path) for name, path in train_inputs.items()}
    row_ids = pq.read_table(paths["rows"] / "rows.parquet").column("row_id").to_pylist()
    rewards = write_rewards(tmp_path / "rewards", {row_id: [n / 5, 1.0] for n, row_id in enumerate(row_ids)})
    inputs = {"rows": paths["rows"], "reference": paths["base"]}
    scored = make_job("score_reference", "reference", config={"max_tokens": 96}, inputs=inputs)
    reference.run(scored)
    return train_inputs | {"rewards": str(rewards), "reference": str(scored.output)}


@pytest.mark.parametrize(
    ("objective", "threads", "kill_after", "stop_after"),
    [
        (SFT, 1, 1, 9),  # before the first checkpoint
        (SFT, 1, 5, 9),
        (SFT, 1, 10, 3),  # behind the last checkpoint, in an attempt that was resumed itself
        ({"objective": "var", "reference_factor": "mean"}, 1, 4, 9),
        ({"objective": "var", "reference_factor": "mean"}, 2, 7, 9),  # where cores share out attention's calls
        ({"objective": "dpo"}, 1, 2, 9),
    ],
    ids=["sft-early", "sft-middle", "sft-late", "var", "var-two-threads", "dpo"],
)
def test_killed_and_stopped_runs_end_bit_identical(
    tmp_path: Path,
    scored_inputs: dict[str, str],
    objective: dict[str, str],
    threads: int,
    kill_after: int,
    stop_after: int,
) -> None:
    """Real child processes: SIGKILL after some steps, and SIGTERM after others, then a run to the end."""
    whole = write_job(tmp_path / "whole", scored_inputs, objective, threads=threads)
    cut = write_job(tmp_path / "cut", scored_inputs, objective, threads=threads)
    before = torch.get_num_threads()
    try:
        run_through(whole, cut, objective, kill_after=kill_after, stop_after=stop_after)
    finally:
        torch.set_num_threads(before)


def run_through(whole: Path, cut: Path, objective: dict[str, str], *, kill_after: int, stop_after: int) -> None:
    """Hold a job that is killed and stopped on its way to one that is not."""
    train.run(Job.read(whole))
    resumed_from = []
    statuses = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: EXIT_INTERRUPTED}
    for after_steps, number in sorted([(kill_after, signal.SIGKILL), (stop_after, signal.SIGTERM)]):
        assert interrupt(cut, number, after_steps=after_steps) == statuses[number], (cut.parent / "log").read_text()
        assert not (cut.parent / "output" / "summary.json").exists()
        resumed_from.append([p.name for p in (cut.parent / "work" / "checkpoints").glob("step-*[0-9]")])
    train.run(Job.read(cut))
    context = f"killed after {kill_after} steps, resumed from {resumed_from}"
    for name in ("model.safetensors", *(() if objective["objective"] == "dpo" else ("weights.parquet",))):
        assert (cut.parent / "output" / name).read_bytes() == (whole.parent / "output" / name).read_bytes(), context
    assert read_figures(cut.parent) == read_figures(whole.parent), context
    assert len(read_figures(cut.parent)) == 12
    assert read_summary(cut.parent) == read_summary(whole.parent)


@pytest.mark.parametrize("every", [3, 0])
def test_a_disk_that_is_full_when_a_run_saves_costs_the_steps_since_its_checkpoint(
    tmp_path: Path, train_inputs: dict[str, str], every: int
) -> None:
    """Real child processes: stopped with a checkpoint, full at the next one or at the trained model, then with room to the end."""
    whole = write_job(tmp_path / "whole", train_inputs)
    cut = write_job(tmp_path / "cut", train_inputs)
    cut.write_text(cut.read_text().replace('"checkpoint_every_steps": 3', f'"checkpoint_every_steps": {every}'))
    train.run(Job.read(whole))
    assert interrupt(cut, signal.SIGTERM, after_steps=4) == EXIT_INTERRUPTED, (cut.parent / "log").read_text()
    checkpoints = cut.parent / "work" / "checkpoints"
    (before,) = (path.name for path in checkpoints.glob("step-*[0-9]"))
    # No file above 64 KiB, as if a disk were full there: metrics fit, neither weights nor their moments do.
    limited = start(cut, within=("bash", "-c", 'ulimit -f 64 && exec "$@"', "full"))
    assert limited.wait() == 1, (cut.parent / "log").read_text()
    error = json.loads((cut.parent / "work" / "error.json").read_text())
    assert "File too large" in error["message"], error
    assert [path.name for path in checkpoints.glob("step-*[0-9]")] == [before]
    assert not (cut.parent / "output" / "model.safetensors").exists()
    assert not (cut.parent / "output" / "summary.json").exists()
    train.run(Job.read(cut))
    for name in ("model.safetensors", "weights.parquet"):
        assert (cut.parent / "output" / name).read_bytes() == (whole.parent / "output" / name).read_bytes()
    assert read_figures(cut.parent) == read_figures(whole.parent)
    assert not list((cut.parent / "output").glob(".partial"))
