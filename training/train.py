"""The job train: rows, stored columns and a base model in; a model folder, its metrics and its weights out."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import TypeAdapter

from training.config import (
    AnyTrainConfig,
    Layout,
    Precision,
    ReferenceFactor,
    ResponseRegime,
    Runtime,
    SftConfig,
    TrainConfig,
    VarConfig,
)
from training.data.batch import cut, lay_out
from training.data.examples import (
    Example,
    load_examples,
    read_dropped,
    read_regime,
    read_scores,
    select_all,
    select_chosen,
    select_distinct,
)
from training.data.rows import RowsWriter
from training.devices import device_peak, name_device
from training.flops import Flops, count_flops
from training.job import Job
from training.logprobs import sum_logps
from training.loop import Progress, Settings, run_steps
from training.model import check_context, load_policy, save_policy, start_torch
from training.objectives.objective import Columns, Objective
from training.objectives.sft import Sft
from training.objectives.var import Var, lambda_in_reward_units, reference_factor, within_group_variance
from training.objectives.weights import argmax_agrees, describe_weights
from training.preflight import Ready, check_run
from training.render import Rendered, Renderer
from training.steps import Forwarded, Steps, gather_columns

LOG = logging.getLogger(__name__)
WEIGHTS_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field(
            "weight", pa.list_(pa.float64()), nullable=False
        ),  # in the order of the row's responses; 0: not trained
    ]
)
MIN_ARGMAX_AGREEMENT = 0.6


def run(job: Job) -> None:
    """Train and write the model folder, `metrics.jsonl`, `weights.parquet`, `preflight.json` and `summary.json` to `output`."""
    started = time.monotonic()
    config = read_config(job)
    ready, dropped = prepare(job, config)
    report = check_run(ready)
    report.require()
    write_weights(job, ready.steps)
    peak = device_peak(ready.device, config.precision)
    progress = run_steps(
        ready.model,
        ready.steps,
        make_settings(config),
        job=job,
        runtime=ready.runtime.model_copy(update={"microbatch_tokens": report.microbatch_tokens}),
        identity={"config": config.model_dump(mode="json"), "plan": ready.steps.digest},
        peak_flops=peak,
    )
    save_policy(ready.model, ready.tokenizer, job.output)
    figures = summarise_run(ready.steps, progress, dropped) | summarise_weights(ready.steps, ready.objective)
    figures |= describe_speed(ready, progress, peak) | report.summary()
    job.write_summary(figures | {"wall_seconds": round(time.monotonic() - started, 3)})


def check(job: Job) -> None:
    """Make the checks that precede training and write `preflight.json` and `summary.json`, whatever they find."""
    ready, _ = prepare(job, read_config(job))
    job.write_summary(check_run(ready).summary())


def read_config(job: Job) -> VarConfig | SftConfig:
    """Return the job's config, checked."""
    return TypeAdapter[VarConfig | SftConfig](AnyTrainConfig).validate_python(job.config)


def prepare(job: Job, config: VarConfig | SftConfig) -> tuple[Ready, Counter[str]]:
    """Return the model with its steps, and the rows that were dropped, by reason."""
    runtime = Runtime.model_validate(job.runtime)
    device = start_torch(runtime)
    # Weights are float32 whatever the precision: bfloat16 loses updates smaller than its 8 bits.
    model, tokenizer = load_policy(job.inputs["base"], precision=Precision.float32, device=device)
    check_context(model, config.max_tokens)
    examples, dropped = gather_examples(job, config, Renderer(tokenizer, max_tokens=config.max_tokens))
    objective = make_objective(job, config, gather_columns(examples))
    forward = PolicyForward(device, runtime.layout, count_flops(model))
    steps = Steps(
        examples, objective, forward, batch_prompts=config.batch_prompts, epochs=config.epochs, seed=config.seed
    )
    ready = Ready(job, runtime, device, config.precision, model, tokenizer, examples, objective, forward, steps)
    return ready, dropped


class PolicyForward:
    """One value per sample: the log-probability of its trained tokens. Dropout is 0, in training too: the model stays in
    evaluation mode, since the weighted likelihood is that of the policy and not of a randomly thinned one."""

    def __init__(self, device: torch.device, layout: Layout, flops: Flops | None = None) -> None:
        self._device = device
        self._layout = layout
        self._flops = flops

    def identity(self, sample: Rendered) -> bytes:
        """Return token ids and span."""
        return sample.ids_T.tobytes() + sample.start.to_bytes(8, "little")

    def cut(
        self, samples: Sequence[Rendered], group_R: np.ndarray, *, budget: int, whole_groups: bool
    ) -> list[list[int]]:
        """Return micro-batches in the layout."""
        return cut(samples, group_R, budget=budget, whole_groups=whole_groups, layout=self._layout)

    def values(self, model: Any, samples: Sequence[Rendered], group_B: np.ndarray) -> Forwarded:
        """Return logp_B in nats."""
        micro = lay_out(samples, group_B, device=self._device, layout=self._layout)
        spans = micro.tree.spans if micro.tree else [(0, len(sample.ids_T)) for sample in samples]
        flops = (
            self._flops.step(tokens=micro.num_tokens, positions=len(micro.target_P), segments=spans)
            if self._flops
            else 0
        )
        return Forwarded(sum_logps(model, micro), micro.num_tokens, micro.ids_BT.numel(), flops)


def gather_examples(job: Job, config: TrainConfig, renderer: Renderer) -> tuple[list[Example], Counter[str]]:
    """Return the examples that the objective trains on, with the columns it needs, and the dropped rows by reason."""
    rows = job.inputs["rows"]
    if isinstance(config, SftConfig):
        return load_examples(rows, renderer, select=select_chosen if config.responses == "chosen" else select_all)
    if "rewards" not in job.inputs:
        raise ValueError(
            f"train: no input `rewards`; got {sorted(job.inputs)}; the objective var needs rewards; score the rows"
        )
    reference_folder = job.inputs.get("reference")
    reference = None
    unscored: set[str] = set()
    if reference_folder is not None:
        reference = read_scores(reference_folder, "logp", columns=["num_tokens"])
        unscored = read_dropped(reference_folder)
    is_fixed_set = read_regime(rows) == ResponseRegime.support
    return load_examples(
        rows,
        renderer,
        # A set holds each response once; among samples a repetition is evidence.
        select=select_distinct if is_fixed_set else select_all,
        rewards=read_scores(job.inputs["rewards"], "reward"),
        reference=reference,
        min_responses=2 if is_fixed_set else 1,
        unscored=frozenset(unscored),
    )


def make_objective(job: Job, config: TrainConfig, columns: Columns) -> Objective:
    """Return the objective; `columns` are those of the whole train split, for lambda's unit."""
    if isinstance(config, SftConfig):
        return Sft()
    assert isinstance(config, VarConfig)
    return Var(
        lambda_=lambda_in_reward_units(config, columns),
        regime=read_regime(job.inputs["rows"]),
        normaliser=config.normaliser,
        reference_factor=config.reference_factor,
    )


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
    """Write `weights.parquet`: the weights of the last epoch, in the order of training."""
    with RowsWriter(job.output / "weights.parquet", WEIGHTS_SCHEMA) as out:
        for step in range(steps.num_steps - steps.steps_per_epoch, steps.num_steps):
            begin = 0
            for example in steps.rows(step):
                weight = [0.0] * example.num_responses
                for k, place in enumerate(example.places):
                    weight[place] = float(steps.weights(step)[begin + k])
                begin += len(example.places)
                out.write([{"row_id": example.row_id, "weight": weight}])


def summarise_run(steps: Steps, progress: Progress, dropped: Counter[str]) -> dict[str, Any]:
    """Return counts and speed."""
    last = range(steps.num_steps - steps.steps_per_epoch, steps.num_steps)
    summary: dict[str, Any] = {
        "steps": steps.num_steps,
        "skipped_steps": progress.skipped,
        "rows": sum(len(steps.rows(step)) for step in last),
        "responses": sum(len(steps.weights(step)) for step in last),
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "flops": progress.flops,
        "microbatch_tokens": progress.microbatch_tokens,
        "mean_trained_tokens": steps.mean_tokens,
        "final_loss": progress.loss,
        "plan": steps.digest,
        "dropped": dropped.total(),
    }
    return summary | {f"dropped_{reason}": count for reason, count in sorted(dropped.items())}


def describe_speed(ready: Ready, progress: Progress, peak_flops: float | None) -> dict[str, Any]:
    """Return what a plan of the next run can go by: device, size of the model, and share of the peak where it is known."""
    known = {"device": name_device(ready.device), "parameters": sum(p.numel() for p in ready.model.parameters())}
    if not (peak_flops and progress.flops and progress.seconds):
        return known
    return known | {"flop_share": progress.flops / progress.seconds / peak_flops}


def summarise_weights(steps: Steps, objective: Objective) -> dict[str, Any]:
    """Return what the weights of the last epoch did; for VAR with lambda and what reward and reference contribute."""
    last = range(steps.num_steps - steps.steps_per_epoch, steps.num_steps)
    columns = gather_columns([example for step in last for example in steps.rows(step)])
    weight_R = np.concatenate([steps.weights(step) for step in last])
    summary: dict[str, Any] = {f"mean_{k}": v for k, v in describe_weights(columns, weight_R).items() if k == "ess"}
    if not isinstance(objective, Var):
        return summary
    agreement = float(argmax_agrees(columns, weight_R).mean())
    summary |= {
        "lambda": objective.lambda_,
        "regime": objective.regime.value,
        "argmax_agreement": agreement,
        "variance_reward_over_lambda": within_group_variance(columns.reward_R, columns.group_R) / objective.lambda_**2,
    }
    if objective.regime == ResponseRegime.support and objective.reference_factor != ReferenceFactor.none:
        factor_R = reference_factor(columns, objective)
        summary["variance_reference_factor"] = within_group_variance(factor_R, columns.group_R)
    if agreement < MIN_ARGMAX_AGREEMENT:
        summary["warning"] = (
            f"only {agreement:.0%} of the prompts give their heaviest weight to the response with the best reward: the reference "
            "factor outweighs the reward; lower lambda, or choose reference_factor mean or none"
        )
        LOG.warning("%s", summary["warning"])
    return summary
