"""The job train: rows, stored columns and a base model in; a model folder, its metrics and its weights out."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import TypeAdapter
from torch import Tensor

from training.config import Layout, Precision, ResponseRegime, Runtime, StoredColumn
from training.cross import plan_batches, read_cross
from training.data.batch import MicroBatch, collate, count_tokens, cut, digest_plan, lay_out
from training.data.examples import Example, load_examples, read_scores
from training.data.manifest import RowsManifest, check_reference, check_samples, check_tokens, read_rows_manifest
from training.data.rows import RowsWriter
from training.data.scored import count_dropped, read_dropped
from training.devices import device_peak, name_device
from training.distributed import World, open_world
from training.flops import Flops, count_flops, read_windows
from training.job import ANSWERS_FILE, Job
from training.logprobs import Policy, as_policy, sum_logps, trained_logps, weigh_logps
from training.loop import Progress, Settings, run_steps
from training.lora import add_adapter, check_gathered, merge_adapter, take_out_adapter, with_adapter, write_adapter
from training.memory import MicroBatchSize
from training.model import (
    ModelDigests,
    check_context,
    check_model_folder,
    digest_model,
    load_policy,
    prepare_layers,
    read_config_file,
    refuse_quantised,
    save_policy,
    start_torch,
)
from training.objectives.objective import Columns, Crosses, FloatArray, Objective, TrainConfig
from training.objectives.registry import AnyTrainConfig
from training.objectives.weights import describe_weights
from training.preflight.ready import Ready
from training.preflight.run import check_run
from training.render import Rendered, Renderer
from training.samples import Sampler
from training.sharding import as_layers, gather_weights, load_sharded_policy, reshard
from training.steps import HELDOUT_ROWS, Forwarded, Steps, gather_columns

LOG = logging.getLogger(__name__)
WEIGHTS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),  # of the plan, from 0
        pa.field("row_id", pa.string(), nullable=False),
        # in the order of the row's responses; 0: not trained
        pa.field("weight", pa.list_(pa.float64()), nullable=False),
    ]
)
ADAPTER_ROWS = 32  # on which an exported adapter is held to what was trained


@dataclass(frozen=True)
class Prepared:
    """A run before its first step, and what its summary tells of how it came to be."""

    policy: Policy
    ready: Ready
    heldout: Steps | None
    kept: list[Example]  # some of the held-out rows
    dropped: Counter[str]
    columns: Columns  # of the train split, as stored


def run(job: Job) -> None:
    """Train and write the model folder, `metrics.jsonl`, `answers.jsonl`, `weights.parquet`, `preflight.json` and `summary.json`
    to `output`."""
    config, runtime = read_config(job), Runtime.model_validate(job.runtime)
    with open_world(runtime, start_torch(runtime)) as world:
        train(job, config, runtime, world)


def check(job: Job) -> None:
    """Make the checks that precede training and write `preflight.json` and `summary.json`, whatever they find."""
    config, runtime = read_config(job), Runtime.model_validate(job.runtime)
    with open_world(runtime, start_torch(runtime)) as world:
        report = check_run(prepare(job, config, runtime, world).ready)
        if world.is_first:
            job.write_summary(report.summary())


def read_config(job: Job) -> TrainConfig:
    """Return the job's config, checked."""
    return TypeAdapter[TrainConfig](AnyTrainConfig).validate_python(job.config)


def train(job: Job, config: TrainConfig, runtime: Runtime, world: World) -> None:
    """Train on this rank; the first one writes what all have in common."""
    started = time.monotonic()
    prepared = prepare(job, config, runtime, world)
    policy, steps, objective = prepared.policy, prepared.ready.steps, prepared.ready.objective
    report = check_run(prepared.ready)
    report.require()
    runtime = runtime.model_copy(update={"microbatch_tokens": report.microbatch_tokens})  # what the device has room for
    if world.is_first and not objective.whole_groups:  # comparisons within a prompt weigh no response
        write_weights(job, steps)
    world.barrier()  # the others have nothing to write
    peak = device_peak(world.device, config.precision)
    progress = run_steps(
        policy,
        steps,
        make_settings(config),
        job=job,
        runtime=runtime,
        identity=prepared.ready.identity,
        world=world,
        heldout=prepared.heldout,
        sampler=Sampler(policy, prepared.ready.tokenizer, prepared.kept, job.output / ANSWERS_FILE, world=world),
        peak_flops=peak * world.size if peak else None,
    )
    speed = describe_speed(
        prepared.ready, progress, peak * world.size if peak else None
    )  # of the model with its adapter
    exported, weights = policy.model, None
    gaps: dict[str, float] = {}
    if config.lora.rank:
        exported, gaps = split_adapter(job, config, policy, prepared.ready.examples[:ADAPTER_ROWS], world)
    elif world.size > 1:
        weights = gather_weights(policy.model, world)
    if world.is_first:
        figures = summarise_run(steps, progress, prepared.dropped)
        figures |= summarise_objective(steps, objective, prepared.columns) | report.summary() | speed | gaps
        save_policy(exported, prepared.ready.tokenizer, job.output, weights=weights)
        job.write_summary(figures | {"wall_seconds": round(time.monotonic() - started, 3)})


def prepare(job: Job, config: TrainConfig, runtime: Runtime, world: World) -> Prepared:
    """Return the policy with its steps; nothing has gone through it yet."""
    policy, tokenizer = open_policy(job.inputs["base"], config, runtime, world)
    check_context(policy.model, config.max_tokens)
    manifest = read_rows_manifest(job.inputs["rows"])
    base = digest_model(job.inputs["base"], tokenizer) if world.is_first else None
    world.barrier()  # it reads all of the base, the others but their part
    if base is not None:
        check_columns(job, config, manifest, base)
    check_tokens(job.inputs["rows"], manifest, tokenizer)
    renderer = Renderer(tokenizer, max_tokens=config.max_tokens)
    examples, dropped = gather_examples(job, config, renderer, regime=manifest.regime)
    columns = gather_columns(examples)
    cross: Crosses = {}
    if StoredColumn.cross in config.columns:
        cross = read_cross(job.inputs["cross"], plan_batches(examples, config))
    objective = config.make(columns, regime=manifest.regime, cross=cross)
    model = policy.model
    forward = PolicyForward(world.device, runtime.layout, count_flops(model), read_windows(model.config))
    trained = replace_rewards(examples, objective.transform(columns))
    steps = Steps(
        trained, objective, forward, batch_prompts=config.batch_prompts, epochs=config.epochs, seed=config.seed
    )
    kept, _ = gather_examples(job, config, renderer, regime=manifest.regime, split="heldout", limit=HELDOUT_ROWS)
    heldout = plan_heldout(kept, config, objective, forward, mean_tokens=steps.mean_tokens)
    identity = {
        "config": config.model_dump(mode="json"),
        "base": base.weights_sha256 if base is not None else None,
        "base_config": read_config_file(job.inputs["base"] / "config.json"),
        "data": steps.digests
        | {"scores": digest_scores(columns, cross), "regime": manifest.regime.value}
        | {"heldout": heldout.digests["rows"] if heldout else ""},
    }
    ready = Ready(
        job, runtime, world, config.precision, policy, tokenizer, trained, objective, forward, steps, identity
    )
    return Prepared(policy, ready, heldout, kept, dropped, columns)


def open_policy(folder: Path, config: TrainConfig, runtime: Runtime, world: World) -> tuple[Policy, Any]:
    """Return (policy, tokenizer), whole on one rank, sharded over several."""
    check_model_folder(folder)
    refuse_quantised(folder)
    if world.size > 1:
        return load_sharded_policy(
            folder,
            world,
            precision=config.precision,
            lora=config.lora if config.lora.rank else None,
            seed=config.seed,
            runtime=runtime,
        )
    # Weights are float32 whatever the precision: bfloat16 loses updates smaller than its 8 bits.
    model, tokenizer = load_policy(folder, precision=Precision.float32, device=world.device)
    if config.lora.rank:
        torch.manual_seed(config.seed)
        add_adapter(model, config.lora)
    prepare_layers(model, runtime, device=world.device)
    return Policy(model), tokenizer


def split_adapter(
    job: Job, config: TrainConfig, policy: Policy, examples: Sequence[Example], world: World
) -> tuple[Any, dict[str, float]]:
    """Return the base with the trained adapter merged into it, and how far both are from what was trained on some prompts.

    Every rank calls it; the first one writes the adapter, and alone gets a model: the base is frozen, so none is gathered. On one rank
    the base is the policy's own, in which the adapter is merged: there may be no room for another. A model that was sharded may be too
    large for a device: it is put together again in the first rank's memory, and held to the policy as its ranks have it.
    """
    samples = [example.samples[0] for example in examples]

    @torch.no_grad()
    def measure(model: Any, device: torch.device) -> Tensor:
        policy = as_policy(model)
        return torch.cat([policy(trained_logps, collate([sample], device=device)) for sample in samples]).cpu()

    with as_layers(world, precision=config.precision):
        expected = measure(policy, world.device)
    reshard(policy)
    trained = gather_weights(policy.model, world, trained_only=True)
    if not world.is_first:
        return None, {}
    write_adapter(job.output / "adapter", config.lora, trained)
    whole, device, gaps = policy.model, world.device, {}
    if world.size > 1:
        device = torch.device("cpu")
        base, _ = load_policy(job.inputs["base"], precision=Precision.float32, device=device)
        whole = with_adapter(base, config.lora, trained)
        gathered = measure(whole, device)
        gaps["gathered_gap"] = check_gathered(gathered, expected=expected, precision=config.precision)
        expected = gathered
    merged, others = merge_adapter(
        take_out_adapter(whole), job.output / "adapter", measure=partial(measure, device=device), expected=expected
    )
    return merged, gaps | others


class PolicyForward:
    """One value per sample: the log-probability of its trained tokens. Dropout is 0, in training too: the model stays in
    evaluation mode, since the weighted likelihood is that of the policy and not of a randomly thinned one."""

    value = "logp"

    def __init__(
        self, device: torch.device, layout: Layout, flops: Flops | None = None, windows: Iterable[int | None] = ()
    ) -> None:
        self._device = device
        self._layout = layout
        self._flops = flops
        self._windows = set(windows)  # of the layers' attention

    def identity(self, sample: Rendered) -> bytes:
        """Return token ids and span."""
        return sample.ids_T.tobytes() + sample.start.to_bytes(8, "little")

    def cut(
        self, samples: Sequence[Rendered], group_R: np.ndarray, *, budget: int, whole_groups: bool, ranks: int = 1
    ) -> list[list[int]]:
        """Return micro-batches in the layout."""
        return cut(samples, group_R, budget=budget, whole_groups=whole_groups, layout=self._layout, ranks=ranks)

    def size(self, samples: Sequence[Rendered], group_B: np.ndarray) -> MicroBatchSize:
        """Return the size of a micro-batch in the layout."""
        tokens = count_tokens(samples, group_B, layout=self._layout)
        return MicroBatchSize(tokens, positions=sum(sample.num_trained for sample in samples))

    def load(self, samples: Sequence[Rendered], group_B: np.ndarray) -> MicroBatch:
        """Return a micro-batch in the layout, with what a GPU's attention needs of its trees: while it is still busy with the one before."""
        micro = lay_out(samples, group_B, device=self._device, layout=self._layout)
        if micro.tree and self._device.type == "cuda":
            micro.tree.make_block_masks(self._windows)
        return micro

    def values(self, model: Any, micro: MicroBatch, slope_B: FloatArray | None = None) -> Forwarded:
        """Return logp_B in nats."""
        flops = (
            self._flops.step(tokens=micro.num_tokens, positions=len(micro.target_P), segments=micro.spans)
            if self._flops
            else 0
        )
        weighted, logp_B = (None, sum_logps(model, micro)) if slope_B is None else weigh_logps(model, micro, slope_B)
        return Forwarded(logp_B, micro.num_tokens, micro.ids_BT.numel(), flops, weighted)


def check_columns(job: Job, config: TrainConfig, manifest: RowsManifest, base: ModelDigests) -> None:
    """Refuse stored numbers that are of another model than the one that is trained, or of responses drawn otherwise."""
    if StoredColumn.reference in config.columns and "reference" in job.inputs:
        check_reference(job.inputs["reference"], base)
    if StoredColumn.cross in config.columns:
        if "cross" not in job.inputs:
            raise ValueError(
                f"train: no input `cross`; got {sorted(job.inputs)}; the objective {config.objective} needs it; run score_cross"
            )
        check_reference(job.inputs["cross"], base)
    if StoredColumn.rewards in config.columns:  # weighted by what the regime says of them
        check_samples(job.inputs["rows"], manifest, base)


def gather_examples(
    job: Job,
    config: TrainConfig,
    renderer: Renderer,
    *,
    regime: ResponseRegime,
    split: str = "train",
    limit: int | None = None,
) -> tuple[list[Example], Counter[str]]:
    """Return the examples that the objective trains on, with the columns it needs, and the dropped rows by reason."""
    rows = job.inputs["rows"]
    rewards = reference = None
    unscored: set[str] = set()
    if StoredColumn.rewards in config.columns:
        if "rewards" not in job.inputs:
            raise ValueError(
                f"train: no input `rewards`; got {sorted(job.inputs)}; the objective {config.objective} needs rewards; score the rows"
            )
        rewards = read_scores(job.inputs["rewards"], "reward")
        unscored |= read_dropped(job.inputs["rewards"])
    # Whether an objective can do without the reference is its own to say: not every regime of VAR looks at it.
    if StoredColumn.reference in config.columns and "reference" in job.inputs:
        reference = read_scores(job.inputs["reference"], "logp", columns=["num_tokens"])
        unscored |= read_dropped(job.inputs["reference"])
    select, min_responses = config.choose_responses(regime)
    return load_examples(
        rows,
        renderer,
        select=select,
        rewards=rewards,
        reference=reference,
        min_responses=min_responses,
        unscored=frozenset(unscored),
        distinct=regime == ResponseRegime.support,
        split=split,
        limit=limit,
    )


def plan_heldout(
    examples: list[Example], config: TrainConfig, objective: Objective, forward: PolicyForward, *, mean_tokens: float
) -> Steps | None:
    """Return held-out rows as one step, weighted and scaled as those that are trained on; None where there are none to weigh."""
    if not examples or StoredColumn.cross in config.columns:  # foreign responses were scored for the train split alone
        return None
    weighed = replace_rewards(examples, objective.transform(gather_columns(examples)))
    return Steps(weighed, objective, forward, batch_prompts=len(examples), epochs=1, seed=0, mean_tokens=mean_tokens)


def replace_rewards(examples: Sequence[Example], columns: Columns) -> list[Example]:
    """Return the examples with the rewards of `columns`, which are theirs in order."""
    if columns.reward_R is None:
        return list(examples)
    ends = np.cumsum([len(example.samples) for example in examples])[:-1]
    rewards = np.split(columns.reward_R, ends)
    return [replace(example, reward_K=reward_K) for example, reward_K in zip(examples, rewards, strict=True)]


def digest_scores(columns: Columns, cross: Crosses) -> str:
    """Return the digest of what weights are made of, as it is stored. Not of the weights: their last bits are the processor's, and a run
    goes on on another kind of it."""
    own = [column.tobytes() for column in (columns.reward_R, columns.logq_R, columns.preferred_R) if column is not None]
    foreign = [matrix.tobytes() for batch in cross.values() for matrix in (batch.reward_GN, batch.logp_ref_GN)]
    return digest_plan([*own, *foreign])


def make_settings(config: TrainConfig) -> Settings:
    """Return what the loop needs of a config."""
    return Settings(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup_fraction=config.warmup_fraction,
        max_grad_norm=config.max_grad_norm,
        precision=config.precision,
        seed=config.seed,
    )


def write_weights(job: Job, steps: Steps) -> None:
    """Write `weights.parquet`: the plan of the run, its rows in the order of training, with the weights of their responses."""
    with RowsWriter(job.output / "weights.parquet", WEIGHTS_SCHEMA) as out:
        for step in range(steps.num_steps):
            begin, rows = 0, []
            for example in steps.rows(step):
                weight = [0.0] * example.num_responses
                for k, place in enumerate(example.places):
                    weight[place] = float(steps.weights(step)[begin + k])
                begin += len(example.places)
                rows.append({"step": step, "row_id": example.row_id, "weight": weight})
            out.write(rows)


def summarise_run(steps: Steps, progress: Progress, dropped: Counter[str]) -> dict[str, Any]:
    """Return counts and speed."""
    last = range(steps.num_steps - steps.steps_per_epoch, steps.num_steps)
    examples = [example for step in last for example in steps.rows(step)]
    return {
        "steps": steps.num_steps,
        "skipped_steps": progress.skipped,
        "rows": len(examples),
        "responses": sum(len(example.samples) for example in examples),
        # of these rows, which the objective does not read, or which repeat one in a fixed set
        "responses_left_out": sum(example.num_responses - len(example.samples) for example in examples),
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "flops": progress.flops,
        "microbatch_tokens": progress.microbatch_tokens,
        "mean_trained_tokens": steps.mean_tokens,
        "final_loss": progress.loss,
        "plan": steps.digest,
        "respaced_responses": sum(sample.respaced for example in examples for sample in example.samples),
        **count_dropped(dropped),
    }


def describe_speed(ready: Ready, progress: Progress, peak_flops: float | None) -> dict[str, Any]:
    """Return what a plan of the next run can go by: device, size of the model, and share of the peak where it is known."""
    known = {"device": name_device(ready.device), "parameters": sum(p.numel() for p in ready.model.parameters())}
    if not (peak_flops and progress.flops and progress.seconds):
        return known
    return known | {"flop_share": progress.flops / progress.seconds / peak_flops}


def summarise_objective(steps: Steps, objective: Objective, stored: Columns) -> dict[str, Any]:
    """Return what the weights of the last epoch did, and what the objective tells of itself."""
    last = range(steps.num_steps - steps.steps_per_epoch, steps.num_steps)
    columns = gather_columns([example for step in last for example in steps.rows(step)])
    weight_R = np.concatenate([steps.weights(step) for step in last])
    told = objective.summary(stored, columns, weight_R)
    if "warning" in told:
        LOG.warning("%s", told["warning"])
    if objective.whole_groups:
        return told
    figures = describe_weights(columns, weight_R)
    return {"mean_ess": figures["ess"], "ess_collapsed": figures["ess_collapsed"]} | told
