"""Twenty steps of VAR whose figures are on file: whoever changes them on purpose writes the file again and says why.

`python tests/golden/test_golden_trajectory.py` writes `var_trajectory.json`. Weights, rows and rewards come from NumPy's generator and all
is float64, so the figures hold on any machine.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from training.config import Layout, Precision, ResponseRegime, Runtime, Schedule
from training.data.examples import Example
from training.job import Job
from training.loop import Settings, run_steps
from training.objectives.var import Normaliser, ReferenceFactor, Var
from training.render import Rendered
from training.steps import Steps
from training.train import PolicyForward
from training.tree import enable_trees

GOLDEN = Path(__file__).with_name("var_trajectory.json")
VOCABULARY = 61
FIGURES = [
    "loss",
    "grad_norm",
    "learning_rate",
    "ess",
    "weight_max",
    "reward_tilt",
    "kl_weights",
    "argmax_agreement",
    "logp_ratio",
    "padding_share",
]
SETTINGS = Settings(
    learning_rate=3e-3,
    weight_decay=0.1,
    schedule=Schedule.cosine,
    warmup_fraction=0.1,
    max_grad_norm=1.0,
    precision=Precision.float32,
    seed=0,
)


def make_model(rng: np.random.Generator) -> Any:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(0.2 * rng.normal(size=tuple(parameter.shape))))
    return model


def make_example(rng: np.random.Generator, name: str) -> Example:
    prompt = rng.integers(0, VOCABULARY, size=rng.integers(2, 12))
    responses = [rng.integers(0, VOCABULARY, size=rng.integers(1, 20)) for _ in range(rng.integers(2, 5))]
    num_tokens = np.array([len(response) for response in responses])
    return Example(
        row_id=name,
        samples=tuple(Rendered(ids_T=np.r_[prompt, r].astype(np.int32), start=len(prompt)) for r in responses),
        places=tuple(range(len(responses))),
        num_responses=len(responses),
        num_tokens_K=num_tokens,
        reward_K=rng.normal(size=len(responses)),
        logp_ref_K=-4.0 * num_tokens * rng.random(size=len(responses)),
    )


def run_trajectory(folder: Path, layout: Layout = Layout.rows) -> list[dict[str, float]]:
    rng = np.random.default_rng(20)
    model = make_model(rng)
    examples = [make_example(rng, f"row{n}") for n in range(20)]
    objective = Var(
        lambda_=0.9,
        regime=ResponseRegime.support,
        normaliser=Normaliser.per_prompt,
        reference_factor=ReferenceFactor.mean,
    )
    if layout == Layout.tree:
        enable_trees(model)
    work = Steps(examples, objective, PolicyForward(torch.device("cpu"), layout), batch_prompts=4, epochs=4, seed=5)
    job = Job(name="train", config={}, runtime={}, inputs={}, output=folder, work=folder)
    run_steps(model, work, SETTINGS, job=job, runtime=Runtime(microbatch_tokens=100), identity={})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[f"train/{name}"] for name in FIGURES} for line in lines]


@pytest.mark.parametrize("layout", list(Layout))
def test_twenty_steps_are_those_on_file(layout: Layout, tmp_path: Path) -> None:
    got, expected = run_trajectory(tmp_path, layout), json.loads(GOLDEN.read_text())
    assert len(got) == len(expected) == 20
    for step, (line, golden) in enumerate(zip(got, expected, strict=True)):
        if layout == Layout.tree:
            assert line.pop("padding_share") == 0.0 < golden.pop("padding_share")
        assert line == pytest.approx(golden, rel=1e-7, abs=1e-10), f"step {step}"
    assert got[-1]["loss"] < got[0]["loss"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(run_trajectory(Path(scratch)), indent=1) + "\n")
