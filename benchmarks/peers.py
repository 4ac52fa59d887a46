"""TRL's trainers on the same pairs, timed in the process of `benchmarks.training`: what a user would take instead."""

import itertools
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.engine import open_model, read_pairs
from benchmarks.training import LONGEST_PAIR
from training.render import Renderer, UnusableRow


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times every step but the first."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 1:
            self.seconds += time.monotonic() - self._begun


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
        "train_sampling_strategy": "group_by_length",
        "activation_checkpointing": False,
    }
    arguments = DPOConfig(**shared(spec), **(tuned if spec["tuned"] else {}))
    watch = Stopwatch()
    trainer = TimedDPO(
        model=model, args=arguments, train_dataset=make_dataset(spec, tokenizer), processing_class=tokenizer,
        callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    pairs = spec["batch_pairs"] * spec["steps"]
    scored = {"scoring_seconds": trainer.scoring_seconds, "scored_pairs": pairs + spec["batch_pairs"]}
    return {"seconds": watch.seconds, "pairs": pairs} | scored


def measure_sft(spec: dict[str, Any]) -> dict[str, Any]:
    """Time TRL's SFT on prompt and chosen, the loss on the chosen alone."""
    tokenizer, model = open_model(spec)
    pairs = make_dataset(spec, tokenizer)
    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    watch = Stopwatch()
    arguments = SFTConfig(**shared(spec), completion_only_loss=True)
    SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[watch]).train()
    return {"seconds": watch.seconds, "pairs": spec["batch_pairs"] * spec["steps"]}


def shared(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of both trainers: the same steps, batch, optimiser and precision as ours."""
    return {
        "output_dir": str(Path(spec["scratch"]) / "trl"),
        "use_cpu": spec["device"] == "cpu",
        "bf16": spec["precision"] == "bfloat16",
        "per_device_train_batch_size": spec["microbatch"],
        "gradient_accumulation_steps": spec["batch_pairs"] // spec["microbatch"],
        "max_steps": spec["steps"] + 1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_length": 2 * LONGEST_PAIR,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_dataset(spec: dict[str, Any], tokenizer: Any) -> Dataset:
    """Return the pairs that our engine trains on, in TRL's conversational form."""
    renderer = Renderer(tokenizer, max_tokens=LONGEST_PAIR)

    def usable() -> Any:
        for row in read_pairs(spec):
            try:
                renderer.row(row["prompt"], row["responses"], row["truncated"])
            except UnusableRow:
                continue
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in row["responses"])
            yield {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}

    return Dataset.from_list(list(itertools.islice(usable(), spec["batch_pairs"] * (spec["steps"] + 1))))
