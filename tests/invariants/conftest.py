"""Small models in float64 and a batch with unequal lengths, weights and first tokens, run through the real engine."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from training.checkpoint import Progress
from training.config import Layout, Precision, ResponseRegime, Runtime, Schedule
from training.data.examples import Example
from training.job import Job
from training.loop import Settings, Total, Trainer, make_optimiser
from training.objectives.objective import Objective
from training.objectives.var import Normaliser, ReferenceFactor, Var
from training.render import Rendered
from training.steps import Steps
from training.train import PolicyForward
from training.tree import enable_trees

VOCABULARY = 61
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    ),
    "sliding": MistralConfig(  # a window shorter than most rows
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        sliding_window=5,
    ),
}
SETTINGS = Settings(
    learning_rate=1e-2,
    weight_decay=0.0,
    schedule=Schedule.constant,
    warmup_fraction=0.0,
    max_grad_norm=1e9,
    precision=Precision.float32,
    seed=0,
)


@pytest.fixture
def wide_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Llama's norm compute in its input's type; the stock one goes through float32 and stops at 7e-4."""
    widen_norms(monkeypatch)


def widen_norms(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (LlamaRMSNorm, MistralRMSNorm):
        patch.setattr(norm, "forward", forward)


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """Return a function from a family's name to a random model in evaluation mode."""

    def make(name: str, *, dtype: torch.dtype = torch.float64) -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype).eval()

    return make


@pytest.fixture
def make_examples() -> Callable[..., list[Example]]:
    """Return a function that makes prompts with K responses each, of unequal lengths and rewards."""

    def make(num_rows: int = 4, *, num_responses: int = 2, seed: int = 0) -> list[Example]:
        rng = np.random.default_rng(seed)
        examples = []
        for row in range(num_rows):
            prompt = rng.integers(0, VOCABULARY, size=rng.integers(1, 9))
            samples = []
            for _ in range(num_responses):
                response = rng.integers(0, VOCABULARY, size=rng.integers(1, 15))
                samples.append(Rendered(ids_T=np.r_[prompt, response].astype(np.int32), start=len(prompt)))
            num_tokens = np.array([sample.num_trained for sample in samples])
            examples.append(
                Example(
                    row_id=f"row{row}",
                    samples=tuple(samples),
                    places=tuple(range(num_responses)),
                    num_responses=num_responses,
                    num_tokens_K=num_tokens,
                    reward_K=rng.normal(size=num_responses),
                    logp_ref_K=-num_tokens * rng.random(size=num_responses),
                )
            )
        return examples

    return make


@pytest.fixture
def var_objective() -> Var:
    """Weights that differ within every prompt."""
    return Var(
        lambda_=0.7,
        regime=ResponseRegime.support,
        normaliser=Normaliser.per_prompt,
        reference_factor=ReferenceFactor.mean,
    )


@pytest.fixture
def run_step(tmp_path: Path) -> Callable[..., Total]:
    """Return a function that runs one step up to its gradients, with the loop's own code; they stay in the model."""

    def run(
        model: Any,
        examples: Sequence[Example],
        objective: Objective,
        *,
        budget: int = 10_000,
        layout: Layout = Layout.tree,
        forward: Any = None,
    ) -> Total:
        if layout == Layout.tree:
            enable_trees(model)
        work = Steps(
            examples,
            objective,
            forward or PolicyForward(torch.device("cpu"), layout),
            batch_prompts=len(examples),
            epochs=1,
            seed=0,
        )
        job = Job(name="train", config={}, runtime={}, inputs={}, output=tmp_path, work=tmp_path)
        runtime = Runtime(microbatch_tokens=budget)
        trainer = Trainer(model, make_optimiser(model, SETTINGS), work, SETTINGS, runtime, job, Progress())
        model.zero_grad()
        total = trainer.accumulate(0)
        assert total is not None
        return total

    return run


@pytest.fixture
def figures_of(run_step: Callable[..., Total]) -> Callable[..., dict[str, float]]:
    """Return a function that gives the figures of one step."""
    return lambda *step: run_step(*step).figures


@pytest.fixture
def accumulate(run_step: Callable[..., Total]) -> Callable[..., tuple[float, dict[str, Tensor]]]:
    """Return a function that gives loss and gradients of one step, before clipping and AdamW."""

    def run(model: Any, *step: Any, **settings: Any) -> tuple[float, dict[str, Tensor]]:
        total = run_step(model, *step, **settings)
        return total.loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    return run
