"""TRL's trainers on the same rows, timed in the process of `benchmarks.training`: what a user would take instead."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from benchmarks.children import await_turn, say
from benchmarks.engine import Pair, open_model, order_pairs, pick_pairs, read_clock
from benchmarks.reward_runs import Curve, Meter, pick_rows
from benchmarks.training import LONGEST_PAIR
from training.data.rows import iterate_rows

NO_END = 100_000  # steps: the callback stops
GROUPED = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}  # by the column `length`


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times the steps behind those that warm up, and counts what the policy is fed in them: end to end, the loading of rows with them, or
    each by itself where other processes have theirs in between."""

    def __init__(self, model: Any, spec: dict[str, Any]) -> None:
        self._model, self._device, self._spec, self._in_turn = model, model.device, spec, "in_turn" in spec
        self._begun = 0.0
        self._seconds: list[float] = []  # of steps; of all together where no other process has some in between
        # Of forward passes: tokens, still on the device, and the same with padding.
        self._seen: list[tuple[Any, int]] = []
        self._counted: list[tuple[Any, int]] = []
        model.register_forward_pre_hook(self._feed, with_kwargs=True)

    def _feed(self, model: Any, arguments: Any, options: Any) -> None:
        padded, mask = options["input_ids"].numel(), options.get("attention_mask")
        self._seen.append((padded if mask is None else mask.sum(), padded))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seen.clear()  # of log-probabilities that were computed before
        if self._in_turn:
            await_turn(self._spec)
            self._begun = read_clock(self._device)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        timed = state.global_step - self._spec["warming_steps"]
        if timed > 0:
            self._counted += self._seen
        if timed > 0 and (self._in_turn or timed == self._spec["steps"]):
            self._seconds.append(read_clock(self._device) - self._begun)
        if timed == 0 and not self._in_turn:
            self._begun = read_clock(self._device)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._loss = state.log_history[-1]["train_loss"]

    def result(self) -> dict[str, Any]:
        """Return `seconds`, `pairs`, the `tokens` that went through the policy, without and with padding, whether it recomputes, and the
        mean `loss` of all steps."""
        return {
            "loss": self._loss,
            "seconds": sum(self._seconds),
            "step_seconds": self._seconds,
            "pairs": self._spec["batch_pairs"] * self._spec["steps"],
            "tokens": sum(int(tokens) for tokens, _ in self._counted),
            "padded_tokens": sum(padded for _, padded in self._counted),
            "recomputes": self._model.is_activation_checkpointing,
        }


class TimedDPO(DPOTrainer):  # type: ignore[misc]
    """DPO that keeps the time of its reference log-probabilities."""

    scoring_seconds = 0.0

    def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Any:
        started = time.monotonic()
        try:
            return super()._precompute_ref_logps(*arguments, **options)
        finally:
            self.scoring_seconds += time.monotonic() - started


def measure_dpo(spec: dict[str, Any]) -> dict[str, Any]:
    """Time TRL's DPO: by default with the reference beside the policy, tuned with its log-probabilities computed before."""
    tokenizer, model = open_model(spec)
    tuned = {
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": spec["microbatch"],
        "activation_checkpointing": False,
    }
    arguments = DPOConfig(**shared(spec), **(tuned if spec["tuned"] else {}))
    reference = None if spec["tuned"] else open_model(spec)[1]  # TRL would look for the folder of random weights
    rows, watch = arrange(spec, tokenizer, length=lambda pair: pair.longest), Stopwatch(model, spec)
    trainer = TimedDPO(
        model=model, ref_model=reference, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    return watch.result() | {"scoring_seconds": trainer.scoring_seconds, "scored_pairs": len(rows)}


def measure_sft(spec: dict[str, Any]) -> dict[str, Any]:
    """Time TRL's SFT on prompt and chosen, the loss on the chosen alone: by default, or tuned."""
    tokenizer, model = open_model(spec)
    pairs = arrange(spec, tokenizer, length=lambda pair: len(pair.chosen.ids_T))
    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    watch = Stopwatch(model, spec)
    tuned = {"activation_checkpointing": False, "padding_free": True, "max_length": None}  # no row is too long
    arguments = SFTConfig(**shared(spec) | (tuned if spec["tuned"] else {}), completion_only_loss=True)
    SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]).train()
    return watch.result()


# --- for the reward comparisons ---


class Looker(TrainerCallback):  # type: ignore[misc]
    """Looks at the policy after every step and stops when all is over."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._curve.look(model):
            control.should_training_stop = True


class Deadline(TrainerCallback):  # type: ignore[misc]
    """Stops after the first step that ends behind a limit, counted from the start of training."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._begun = self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.monotonic() - self._begun
        if self.seconds >= self._limit:
            control.should_training_stop = True


class TimedGRPO(GRPOTrainer):  # type: ignore[misc]
    """GRPO that keeps the seconds of its phases; backward passes and the optimiser are the rest."""

    curve: Curve

    def _generate(self, *arguments: Any, **options: Any) -> Any:
        with self.curve.phase("sample"):
            return super()._generate(*arguments, **options)

    def _calculate_rewards(self, *arguments: Any, **options: Any) -> Any:
        with self.curve.phase("score"):
            return super()._calculate_rewards(*arguments, **options)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        with self.curve.phase("forward"):
            return super().compute_loss(*arguments, **options)


def measure_grpo(spec: dict[str, Any]) -> dict[str, Any]:
    """Train TRL's GRPO until the target is reached or the limit. What is not named here is as TRL has it by default; a step's responses are
    sampled in one batch."""
    curve = Curve(spec)
    with curve.phase("prepare"):
        trainer = make_grpo(spec, curve)
    trainer.train()
    return curve.result() | {"steps": trainer.state.global_step}


def make_grpo(spec: dict[str, Any], curve: Curve) -> TimedGRPO:
    """Return the trainer before its first step."""
    tokenizer, model = open_model(spec)
    rows = pick_rows(Path(spec["rows"]), split="train", limit=spec["prompts"])

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return list(curve.meter.scorer.score(prompts, texts, budget=spec["microbatch_tokens"])[0].tolist())

    arguments = GRPOConfig(
        **common(spec),
        per_device_train_batch_size=spec["microbatch"],
        gradient_accumulation_steps=spec["batch_prompts"] * spec["responses"] // spec["microbatch"],
        num_generations=spec["responses"],
        max_completion_length=spec["new_tokens"],
        learning_rate=spec["learning_rate"],
        max_steps=NO_END,
        **({"activation_checkpointing": False} if spec["tuned"] else {}),
    )
    trainer = TimedGRPO(
        model=model, reward_funcs=reward, args=arguments, processing_class=tokenizer, callbacks=[Looker(curve)],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
    )  # fmt: skip
    trainer.curve = curve
    return trainer


def measure_dpo_gain(spec: dict[str, Any]) -> dict[str, Any]:
    """Train TRL's DPO on the pairs for the given seconds and return the answers' rewards. Its reference runs beside the policy: in a first
    epoch that costs what computing its log-probabilities before would."""
    tokenizer, model = open_model(spec)
    meter, watch = Meter(spec), Deadline(spec["limit"])
    rows = list(iterate_rows(Path(spec["rows"]), split="train"))
    arguments = DPOConfig(
        **common(spec),
        per_device_train_batch_size=spec["microbatch"],
        gradient_accumulation_steps=spec["batch_pairs"] // spec["microbatch"],
        learning_rate=spec["learning_rate"],
        beta=spec["beta"],
        max_length=2 * spec["longest_pair"],
        max_steps=NO_END,
        activation_checkpointing=False,
        seed=spec["seed"],
        **GROUPED,
    )
    trainer = DPOTrainer(
        model=model, args=arguments, processing_class=tokenizer, callbacks=[watch],
        train_dataset=Dataset.from_list([as_pair(row) for row in rows]),
    )  # fmt: skip
    trainer.train()
    pairs = trainer.state.global_step * spec["batch_pairs"]
    say(f"{pairs} pairs in {watch.seconds:.0f} s")
    return {"rewards": meter.rewards(trainer.model).tolist(), "seconds": watch.seconds, "pairs": pairs}


# --- for all ---


def common(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of all trainers: our device, precision and schedule, and nothing written."""
    return {
        "output_dir": str(Path(spec["folder"]) / "trl"),
        "use_cpu": spec["device"] == "cpu",
        "bf16": spec["precision"] == "bfloat16",
        "lr_scheduler_type": "constant",
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def shared(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the timed trainers: the same steps, batch and optimiser as ours."""
    return common(spec) | {
        "per_device_train_batch_size": spec["microbatch"],
        "gradient_accumulation_steps": spec["batch_pairs"] // spec["microbatch"],
        "max_steps": spec["warming_steps"] + spec["steps"],
        "learning_rate": 1e-6,
        "max_length": 2 * LONGEST_PAIR,
        "train_sampling_strategy": "sequential",
    }


def arrange(spec: dict[str, Any], tokenizer: Any, *, length: Callable[[Pair], int]) -> Dataset:
    """Return the pairs in TRL's conversational form, every step's the same as VAR's; tuned, those of like length together within a step, which
    is what TRL's own grouping does with so few rows."""
    steps = order_pairs(spec, pick_pairs(spec, tokenizer))
    if spec["tuned"]:
        steps = [sorted(step, key=length, reverse=True) for step in steps]
    return Dataset.from_list([as_pair(pair.row) for step in steps for pair in step])


def as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in TRL's conversational form, with its `length` in characters: DPO's rows have no `input_ids` to count."""
    preferred = row["preferred"]
    chosen, rejected = ([{"role": "assistant", "content": row["responses"][k]}] for k in (preferred, 1 - preferred))
    length = sum(len(message["content"]) for message in row["prompt"]) + max(map(len, row["responses"]))
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "length": length}
