"""The job reward_model: preferred and rejected responses in, a sequence-classification model with one label out.

Trained by the same loop as the policy, with the objective bradley_terry. Its accuracy stands beside that of "the longer response
wins": on several preference sets a small reward model is no better, and then it is not a reward.
"""

import copy
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from scipy.stats import beta
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from training.config import RewardModelConfig, Runtime, Schedule
from training.data.batch import cut_rows, pack_by_tokens
from training.data.examples import Example
from training.data.rows import iterate_rows
from training.data.scored import count_dropped
from training.data.selection import select_preferred_first
from training.devices import device_peak
from training.distributed import World, open_world
from training.flops import count_reward_flops
from training.job import Job
from training.logprobs import Policy, as_policy
from training.loop import Progress, Settings, run_steps
from training.memory import MicroBatchSize
from training.model import (
    LOCAL,
    check_context,
    check_model_folder,
    check_vocabulary,
    checkpoint_activations,
    read_config_file,
    reading,
    refuse_quantised,
    refuse_unused,
    require_weights,
    save_policy,
    start_torch,
    train_every_id,
)
from training.objectives.bradley_terry import BradleyTerry
from training.objectives.objective import FloatArray
from training.preflight.ready import Ready
from training.preflight.run import check_run
from training.render import UnusableRow
from training.reward.render import RewardInput, RewardRenderer
from training.reward.scorer import RewardBatch, collate_inputs, compute_rewards, score_batch, set_pad_token
from training.sharding import as_layers, gather_weights, reshard, shard_and_read
from training.steps import HELDOUT_ROWS, Forwarded, Steps
from training.weights import digest_weights

# B responses of a micro-batch

LOG = logging.getLogger(__name__)


@dataclass
class Pairs:
    """The usable rows of a split; the first response of each is the preferred one."""

    examples: list[Example]
    num_chars: list[list[int]]  # of each example's responses, for the length baseline
    dropped: Counter[str]
    cut: int = 0  # responses that did not fit whole, with their prompt


def run(job: Job) -> None:
    """Train and write the model folder, `metrics.jsonl`, `preflight.json` and `summary.json`. ValueError below the accuracy floor."""
    config = RewardModelConfig.model_validate(job.config)
    runtime = Runtime.model_validate(job.runtime)
    with open_world(runtime, start_torch(runtime)) as world:
        dropout = read_dropout(job.inputs["base"])
        if dropout and world.size > 1:
            # What each rank drops is its own: the numbers would depend on how many there are.
            LOG.warning("the base has dropout %g: its first rank trains it alone", dropout)
            if not world.is_first:
                return
            world = World(world.device)
        train(job, config, runtime, world)


def train(job: Job, config: RewardModelConfig, runtime: Runtime, world: World) -> None:
    """Train on this rank; the first one writes what all have in common."""
    started = time.monotonic()
    ready, heldout, pairs = prepare(job, config, runtime, world)
    report = check_run(ready)
    report.require()
    runtime = runtime.model_copy(update={"microbatch_tokens": report.microbatch_tokens})  # what the device has room for
    policy, steps, identity = ready.policy, ready.steps, ready.identity
    policy.train()  # the base's own dropout, drawn from the run's seed
    peak = device_peak(world.device, config.precision)
    progress = run_steps(
        policy,
        steps,
        make_settings(config),
        job=job,
        runtime=runtime,
        identity=identity,
        world=world,
        heldout=heldout,
        peak_flops=peak * world.size if peak else None,
    )
    policy.eval()
    with as_layers(world, precision=config.precision):
        accuracy = measure_accuracy(policy, pairs["heldout"], budget=runtime.microbatch_tokens)
    check_accuracy(accuracy, config)
    reshard(policy)
    weights = gather_weights(policy.model, world) if world.size > 1 else None
    if not world.is_first:
        return
    save_policy(policy.model, ready.tokenizer, job.output, weights=weights)
    told = summarise_run(ready, pairs, progress) | accuracy | report.summary()
    job.write_summary(told | {"wall_seconds": round(time.monotonic() - started, 3)})


def prepare(
    job: Job, config: RewardModelConfig, runtime: Runtime, world: World
) -> tuple[Ready, Steps, dict[str, Pairs]]:
    """Return all that training starts with, some held-out pairs as one step, and the rows of both splits."""
    policy, tokenizer = load_base(job.inputs["base"], config, runtime, world)
    renderer = RewardRenderer(tokenizer, render=config.render, max_tokens=config.max_tokens)
    pairs = {split: load_pairs(job.inputs["rows"], renderer, split=split) for split in ("train", "heldout")}
    examples, objective = pairs["train"].examples, BradleyTerry()
    forward = RewardForward(policy.model, dropout=read_dropout(job.inputs["base"]))
    steps = Steps(
        examples, objective, forward, batch_prompts=config.batch_prompts, epochs=config.epochs, seed=config.seed
    )
    kept = pairs["heldout"].examples[:HELDOUT_ROWS]
    heldout = Steps(kept, objective, forward, batch_prompts=len(kept), epochs=1, seed=0)
    base = digest_weights(job.inputs["base"]) if world.is_first else None
    world.barrier()  # it reads all of the base, the others but their part
    identity = {
        "config": config.model_dump(mode="json"),
        "base": base,
        "data": steps.digests | {"heldout": heldout.digests["rows"]},
        "base_config": read_config_file(job.inputs["base"] / "config.json"),
    }
    start = (job, runtime, world, config.precision, policy, tokenizer, examples, objective, forward, steps, identity)
    return Ready(*start, is_reward_model=True), heldout, pairs


def summarise_run(ready: Ready, pairs: dict[str, Pairs], progress: Progress) -> dict[str, Any]:
    """Return counts and speed."""
    dropped = sum((split.dropped for split in pairs.values()), Counter[str]())
    return {
        "steps": ready.steps.num_steps,
        "skipped_steps": progress.skipped,
        "rows": len(ready.examples),
        "rows_heldout": len(pairs["heldout"].examples),
        "final_loss": progress.loss,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "microbatch_tokens": progress.microbatch_tokens,
        "dropout": max((m.p for m in ready.policy.modules() if isinstance(m, nn.Dropout)), default=0.0),
        "cut_responses": sum(split.cut for split in pairs.values()),
        **count_dropped(dropped),
    }


def read_dropout(folder: Path) -> float:
    """Return the largest dropout that a model's configuration names in any of its parts."""
    check_model_folder(folder)
    values = AutoConfig.from_pretrained(folder, **LOCAL).to_dict()
    named = (value for name, value in values.items() if "dropout" in name or "pdrop" in name)
    return max((float(value) for value in named if isinstance(value, int | float)), default=0.0)


def load_base(folder: Path, config: RewardModelConfig, runtime: Runtime, world: World) -> tuple[Policy, Any]:
    """Return (model with one label, tokenizer) in float32, whole on one rank, sharded over several.

    A head that the base lacks is drawn from the seed; ValueError where it lacks anything else.
    """
    check_model_folder(folder)
    refuse_quantised(folder)
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    torch.manual_seed(config.seed)
    if world.size == 1:
        with reading(folder):
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=1,
                **LOCAL,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        require_weights(
            [name for name in loaded["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")], folder
        )
        refuse_unused(loaded["unexpected_keys"], model, folder)
        model.to(world.device)
    else:
        described = AutoConfig.from_pretrained(folder, num_labels=1, **LOCAL)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForSequenceClassification.from_config(described, dtype=torch.float32)
    check_vocabulary(model, tokenizer, folder)
    set_pad_token(model, tokenizer, folder)
    check_context(model, config.max_tokens)
    train_every_id(model)
    policy = Policy(model)
    if runtime.activation_checkpointing:
        checkpoint_activations(model)
    if world.size > 1:
        shard_and_read(policy, folder, world, precision=config.precision, drawn=draw_head(model))
    return policy, tokenizer


def draw_head(model: Any) -> dict[str, Tensor]:
    """Return the first tensors of what a model has outside its base, by name, on the CPU: as transformers draws them."""
    drawn: dict[str, Tensor] = {}
    for name, module in model.named_children():
        if name != model.base_model_prefix:
            whole = copy.deepcopy(module).to_empty(device="cpu")
            whole.apply(model._init_weights)
            drawn |= {f"{name}.{below}": tensor for below, tensor in whole.state_dict().items()}
    return drawn


class RewardForward:
    """One value per sample: the reward."""

    value = "reward"

    def __init__(self, model: Any, *, dropout: float = 0.0) -> None:
        self._model = model
        self._dropout = dropout
        self._flops = count_reward_flops(model)

    def identity(self, sample: RewardInput) -> bytes:
        """Return ids and segments."""
        return repr((sample.ids, sample.segments)).encode()

    def cut(
        self, samples: Sequence[RewardInput], group_R: np.ndarray, *, budget: int, whole_groups: bool, ranks: int = 1
    ) -> list[list[int]]:
        """Return micro-batches of separate rows."""
        lengths = [len(sample.ids) for sample in samples]
        return cut_rows(lengths, group_R, budget=budget, whole_groups=whole_groups, ranks=ranks)

    def size(self, samples: Sequence[RewardInput], group_B: np.ndarray) -> MicroBatchSize:
        """Return the size of a micro-batch: no logits over a vocabulary, and with dropout the scores of attention."""
        T = max(len(sample.ids) for sample in samples)
        return MicroBatchSize(len(samples) * T, positions=0, scores=len(samples) * T * T if self._dropout else 0)

    def load(self, samples: Sequence[RewardInput], group_B: np.ndarray) -> RewardBatch:
        """Return the samples padded, on their way to the model's device."""
        return collate_inputs(self._model, samples)

    def values(self, model: Any, micro: RewardBatch, slope_B: FloatArray | None = None) -> Forwarded:
        """Return reward_B, float64."""
        reward_B, lengths = as_policy(model)(compute_rewards, micro).double(), micro.lengths
        segments = [(0, length) for length in lengths]
        flops = self._flops.step(tokens=sum(lengths), positions=len(lengths), segments=segments) if self._flops else 0
        return Forwarded(reward_B, sum(lengths), micro.ids_BT.numel(), flops)


def make_settings(config: RewardModelConfig) -> Settings:
    """Return what the loop needs of a config: after warm-up the learning rate falls linearly."""
    return Settings(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        schedule=Schedule.linear,
        warmup_fraction=config.warmup_fraction,
        max_grad_norm=config.max_grad_norm,
        precision=config.precision,
        seed=config.seed,
    )


def load_pairs(rows: Path, renderer: RewardRenderer, *, split: str) -> Pairs:
    """Return the rows of a split with a preferred response and at least one different other; ValueError where there are none."""
    pairs = Pairs(examples=[], num_chars=[], dropped=Counter())
    for row in iterate_rows(rows, split=split):
        responses = row["responses"]
        if row["preferred"] is None:
            pairs.dropped["no_preference"] += 1
            continue
        places = select_preferred_first(row, distinct=False)
        if len(places) < 2:
            pairs.dropped["equal_responses"] += 1
            continue
        try:
            samples = renderer([row["prompt"]] * len(places), [responses[k] for k in places])
        except UnusableRow as unusable:
            pairs.dropped[unusable.reason] += 1
            continue
        # What it reads of both may be the same, as where they differ behind what fits: there is nothing to learn.
        kept = [n for n, sample in enumerate(samples) if n == 0 or not samples[0].reads_as(sample)]
        if len(kept) < 2:
            pairs.dropped["same_tokens"] += 1
            continue
        pairs.cut += sum(samples[n].cut for n in kept)
        pairs.examples.append(
            Example(
                row_id=row["row_id"],
                samples=tuple(samples[n] for n in kept),
                places=tuple(places[n] for n in kept),
                num_responses=len(responses),
                num_tokens_K=np.array([len(samples[n].ids) for n in kept]),
                preferred=0,
            )
        )
        pairs.num_chars.append([len(responses[places[n]]) for n in kept])
    if not pairs.examples:
        counts = (
            ", ".join(f"{count} {reason}" for reason, count in sorted(pairs.dropped.items())) or "the split is empty"
        )
        raise ValueError(
            f"rows folder {rows}: no pair of the {split} split is left ({counts}); expected rows with a preferred response; "
            "add preferences, or change heldout_fraction"
        )
    return pairs


def measure_accuracy(model: Any, pairs: Pairs, *, budget: int) -> dict[str, float]:
    """Return the share of held-out prompts whose preferred response wins, with its 95 % interval, and the length baseline."""
    samples = [sample for example in pairs.examples for sample in example.samples]
    rewards = np.empty(len(samples))
    for members in pack_by_tokens([len(sample.ids) for sample in samples], budget=budget):
        rewards[members] = score_batch(model, [samples[n] for n in members]).numpy()
    ends = np.cumsum([len(example.samples) for example in pairs.examples])[:-1]
    wins = sum(share_of_wins(reward_K) for reward_K in np.split(rewards, ends))
    count = len(pairs.examples)
    low, high = binomial_interval(wins, count)
    length_wins = sum(share_of_wins(np.array(chars, dtype=float)) for chars in pairs.num_chars)
    return {
        "accuracy": wins / count,
        "accuracy_low": low,
        "accuracy_high": high,
        "length_baseline_accuracy": length_wins / count,
    }


def share_of_wins(value_K: np.ndarray) -> float:
    """Return the share of the others that the first value exceeds; ties count half."""
    return float(((value_K[0] > value_K[1:]) + 0.5 * (value_K[0] == value_K[1:])).mean())


def binomial_interval(wins: float, count: int) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) 95 % interval of a share; a prompt is one trial, however many responses it has."""
    low = float(beta.ppf(0.025, wins, count - wins + 1)) if wins > 0 else 0.0
    high = float(beta.ppf(0.975, wins + 1, count - wins)) if wins < count else 1.0
    return low, high


def check_accuracy(accuracy: dict[str, float], config: RewardModelConfig) -> None:
    """Raise ValueError below the floor: a reward that does not know the preferences would train the policy on noise."""
    if accuracy["accuracy"] < config.min_accuracy:
        raise ValueError(
            f"reward model: held-out pairwise accuracy is {accuracy['accuracy']:.3f} (95 % interval {accuracy['accuracy_low']:.3f} "
            f"to {accuracy['accuracy_high']:.3f}; the longer response wins {accuracy['length_baseline_accuracy']:.3f}); "
            f"expected at least {config.min_accuracy}; take more rows, more epochs or a stronger base, or lower min_accuracy"
        )
