"""What must not change a gradient, and what the gradient must be. Compared before clipping and AdamW, which hide a factor.

Both the largest and the mean deviation are bounded: a dropped micro-batch drifts to one side, it is no outlier.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.config import Layout, ResponseRegime, Runtime
from training.data.batch import MicroBatch
from training.model import checkpoint_activations, compile_layers, prepare_layers
from training.objectives.dpo import Dpo
from training.objectives.objective import Columns, FloatArray
from training.objectives.sft import Sft
from training.objectives.var import ReferenceFactor, Var
from training.steps import Forwarded, Steps
from training.train import PolicyForward

Gradients = dict[str, Tensor]


@dataclass
class Fixed(Sft):
    """Weights given outright, one list a row, so that a test can set them."""

    by_row: dict[str, list[float]]

    def weigh(self, columns: Columns) -> FloatArray:
        return np.concatenate([self.by_row[row_id] for row_id in columns.row_ids])


def assert_close(got: Gradients, expected: Gradients, *, bound: float) -> None:
    """Bound the largest and the mean deviation relative to the largest gradient."""
    assert got.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    gaps = torch.cat([(got[name] - expected[name]).flatten() for name in expected]) / scale
    assert scale > 0
    assert gaps.abs().max() <= bound
    assert gaps.mean().abs() <= bound / 10


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.usefixtures("wide_norm")
def test_micro_batches_change_nothing(
    name: str,
    dtype: torch.dtype,
    bound: float,
    make_model: Any,
    make_examples: Any,
    var_objective: Var,
    accumulate: Any,
) -> None:
    model, examples = make_model(name, dtype=dtype), make_examples(8, num_responses=3)
    loss, expected = accumulate(model, examples, var_objective)
    for budget in (1, 30, 60):  # each response alone, then a few together
        other_loss, got = accumulate(model, examples, var_objective, budget=budget)
        assert other_loss == pytest.approx(loss, rel=bound)
        assert_close(got, expected, bound=bound)


class Watched(PolicyForward):
    """Counts the micro-batches that are still there when another one runs."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), Layout.tree)
        self.there: list[Any] = []
        self.most = 0

    def values(self, model: Any, micro: MicroBatch, slope_B: Any = None) -> Forwarded:
        self.there.append(weakref.ref(micro.tree))
        self.most = max(self.most, sum(tree() is not None for tree in self.there))
        return super().values(model, micro, slope_B)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_micro_batch_is_let_go_of_before_the_next_one_runs(
    checkpointing: bool, make_model: Any, make_examples: Any, var_objective: Var, accumulate: Any
) -> None:
    """Its masks of attention too: on a CPU they are as large as the squares of responses."""
    model, watched = make_model("llama"), Watched()
    if checkpointing:
        checkpoint_activations(model)
    accumulate(model, make_examples(8, num_responses=3), var_objective, budget=60, forward=watched)
    assert len(watched.there) > 3 and watched.most == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "checkpointing"),
    [("llama", Layout.tree, False), ("llama", Layout.rows, False), ("sliding", Layout.tree, True)],
)
def test_compiled_layers_give_the_gradients_of_the_model_as_it_is(
    name: str,
    layout: Layout,
    checkpointing: bool,
    make_model: Any,
    make_examples: Any,
    var_objective: Var,
    accumulate: Any,
) -> None:
    """Micro-batches of other lengths and other numbers of prompts run through the same code: it is compiled once for both layers and all of them."""
    torch.compiler.reset()
    model, examples = make_model(name, dtype=torch.float32), make_examples(8, num_responses=3)
    loss, expected = accumulate(model, examples, var_objective, budget=60, layout=layout)
    runtime = Runtime(compile=True, activation_checkpointing=checkpointing)
    prepare_layers(model, runtime, device=torch.device("cpu"))
    begun = count_graphs()
    other_loss, got = accumulate(model, examples, var_objective, budget=60, layout=layout)
    made = count_graphs()
    assert made > begun
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert_close(got, expected, bound=1e-5)
    for other in (90, 10_000):  # all eight prompts together, too
        accumulate(model, examples, var_objective, budget=other, layout=layout)
    assert count_graphs() == made


def count_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_a_compiler_that_is_not_there_is_named_before_anything_is_trained(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    told = r"runtime.compile: torch.compile fails here .*set runtime.compile to false"
    with (
        torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler")),
        pytest.raises(ValueError, match=told),
    ):
        compile_layers(make_model("llama"), device=torch.device("cpu"))


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("name", ["llama", "gpt2", "sliding"])
def test_activation_checkpointing_changes_no_bit(
    name: str, layout: Layout, make_model: Any, make_examples: Any, var_objective: Var, accumulate: Any
) -> None:
    model, examples = make_model(name), make_examples(8, num_responses=3)
    loss, expected = accumulate(model, examples, var_objective, budget=60, layout=layout)
    checkpoint_activations(model)
    again, got = accumulate(model, examples, var_objective, budget=60, layout=layout)
    assert again == loss and got.keys() == expected.keys()
    assert all(torch.equal(got[parameter], gradient) for parameter, gradient in expected.items())


def test_layers_that_no_model_names_are_not_checkpointed_in_silence(make_model: Any) -> None:
    model = make_model("llama")
    model._no_split_modules = None
    with pytest.raises(ValueError, match=r"activation_checkpointing: model type llama names no layers"):
        checkpoint_activations(model)


@pytest.mark.usefixtures("wide_norm")
def test_micro_batches_change_nothing_of_dpo(make_model: Any, make_examples: Any, accumulate: Any) -> None:
    """A prompt's comparisons stay in one forward pass; how many prompts share it is indifferent."""
    model, examples = make_model("llama"), make_examples(8, num_responses=3)
    loss, expected = accumulate(model, examples, Dpo(beta=0.2))
    for budget in (1, 60, 120):
        other_loss, got = accumulate(model, examples, Dpo(beta=0.2), budget=budget)
        assert other_loss == pytest.approx(loss, rel=1e-10)
        assert_close(got, expected, bound=1e-10)


def test_the_plan_of_dpo_is_another_with_other_reference_log_probabilities(make_examples: Any) -> None:
    """Its weights are counts, so what its loss reads of the reference must be in the digest itself."""

    def digest(examples: Any) -> str:
        forward = PolicyForward(torch.device("cpu"), Layout.tree)
        return Steps(examples, Dpo(beta=0.2), forward, batch_prompts=2, epochs=1, seed=0).digest

    examples = make_examples(4)
    moved = [*examples[:3], dataclasses.replace(examples[3], logp_ref_K=examples[3].logp_ref_K + 1e-9)]
    assert digest(examples) == digest(make_examples(4)) != digest(moved)


class LeftPadded(PolicyForward):
    """The engine's forward with padding on the other side."""

    def load(self, samples: Any, group_B: np.ndarray) -> MicroBatch:
        T = max(len(s.ids_T) for s in samples)
        ids, mask = (torch.zeros(len(samples), T, dtype=torch.long) for _ in range(2))
        predictors, targets = [], []
        for row, sample in enumerate(samples):
            pad = T - len(sample.ids_T)
            ids[row, pad:] = torch.from_numpy(sample.ids_T.astype(np.int64))
            mask[row, pad:] = 1
            predictors += [row * T + pad + t - 1 for t in range(sample.start, len(sample.ids_T))]
            targets += sample.ids_T[sample.start :].tolist()
        return MicroBatch(
            ids_BT=ids,
            predictor_P=torch.tensor(predictors),
            target_P=torch.tensor(targets),
            trained=tuple(sample.num_trained for sample in samples),
            spans=[(0, len(sample.ids_T)) for sample in samples],
            attention_BT=mask,
            position_BT=(mask.cumsum(1) - 1).clamp(min=0),
        )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.usefixtures("wide_norm")
def test_left_right_and_no_padding_agree(
    name: str,
    dtype: torch.dtype,
    bound: float,
    make_model: Any,
    make_examples: Any,
    var_objective: Var,
    accumulate: Any,
) -> None:
    model, examples = make_model(name, dtype=dtype), make_examples()
    _, right = accumulate(model, examples, var_objective, layout=Layout.rows)
    _, alone = accumulate(model, examples, var_objective, layout=Layout.rows, budget=1)
    left_padded = LeftPadded(torch.device("cpu"), Layout.rows)
    _, left = accumulate(model, examples, var_objective, layout=Layout.rows, forward=left_padded)
    assert_close(alone, right, bound=bound)
    assert_close(left, right, bound=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "sliding"])
@pytest.mark.usefixtures("wide_norm")
def test_shared_prompts_packed_trees_and_separate_rows_agree(
    name: str,
    dtype: torch.dtype,
    bound: float,
    make_model: Any,
    make_examples: Any,
    var_objective: Var,
    accumulate: Any,
) -> None:
    """All prompts in one sequence; one tree at a time; groups cut into trees that repeat their prompt; rows."""
    model, examples = make_model(name, dtype=dtype), make_examples(6, num_responses=4)
    _, rows = accumulate(model, examples, var_objective, layout=Layout.rows)
    for budget in (10_000, 40, 25, 1):
        _, trees = accumulate(model, examples, var_objective, budget=budget)
        assert_close(trees, rows, bound=bound)


def test_unit_weights_are_sft_bit_for_bit(
    make_model: Any, make_examples: Any, accumulate: Any, var_objective: Var
) -> None:
    model, examples = make_model("llama", dtype=torch.float32), make_examples()
    uniform = Var(
        lambda_=1e300,
        regime=ResponseRegime.from_reference,
        normaliser=var_objective.normaliser,
        reference_factor=ReferenceFactor.none,
    )
    loss, expected = accumulate(model, examples, Sft())
    var_loss, got = accumulate(model, examples, uniform)
    assert var_loss == loss
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_zero_weight_is_absence(make_model: Any, make_examples: Any, accumulate: Any) -> None:
    """The sums agree; denominators count N, so the smaller batch is scaled by its own N and Tbar."""
    model, examples = make_model("gpt2"), make_examples(4)
    weights = {"row0": [2.0, 0.0], "row1": [0.0, 0.0], "row2": [0.5, 1.5], "row3": [1.0, 1.0]}
    kept = []
    for example in examples:
        alive = [k for k in range(2) if weights[example.row_id][k] > 0]
        if alive:
            changes = {
                "samples": tuple(example.samples[k] for k in alive),
                "places": tuple(alive),
                "num_tokens_K": example.num_tokens_K[alive],
                "reward_K": example.reward_K[alive],
                "logp_ref_K": example.logp_ref_K[alive],
            }
            kept.append(dataclasses.replace(example, **changes))
    loss, whole = accumulate(model, examples, Fixed(weights))
    alive_weights = {row_id: [w for w in row if w > 0] for row_id, row in weights.items()}
    other_loss, absent = accumulate(model, kept, Fixed(alive_weights))
    # the sum of trained tokens is N * Tbar: the denominators' ratio
    ratio = sum(e.num_tokens_K.sum() for e in kept) / sum(e.num_tokens_K.sum() for e in examples)
    assert other_loss * ratio == pytest.approx(loss, rel=1e-12)
    assert_close({name: g * ratio for name, g in absent.items()}, whole, bound=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.usefixtures("wide_norm")
def test_gradients_equal_finite_differences(
    name: str, make_model: Any, make_examples: Any, var_objective: Var, accumulate: Callable[..., Any]
) -> None:
    """Of every parameter at two places where the gradient is large, so that 0 = 0 shows nothing, and at any other."""
    model, examples = make_model(name), make_examples()
    _, gradients = accumulate(model, examples, var_objective)
    rng, h = np.random.default_rng(0), 1e-5
    for parameter_name, parameter in model.named_parameters():
        flat, gradient = parameter.data.view(-1), gradients[parameter_name].view(-1).numpy()
        largest = np.abs(gradient).max()
        assert largest > 1e-2, parameter_name
        places = rng.choice(np.flatnonzero(np.abs(gradient) > 1e-3 * largest), size=2, replace=False)
        for index in (*places, rng.integers(len(gradient))):
            value, losses = flat[index].item(), []
            for shift in (h, -h):
                flat[index] = value + shift
                losses.append(accumulate(model, examples, var_objective)[0])
            flat[index] = value
            numeric = (losses[0] - losses[1]) / (2 * h)
            assert numeric == pytest.approx(gradient[index], abs=1e-8 * largest, rel=1e-6), parameter_name


def test_directional_difference_of_a_stock_llama(
    make_model: Any, make_examples: Any, var_objective: Var, accumulate: Callable[..., Any]
) -> None:
    """Along the gradient itself, where the float32 norm of the stock model still leaves three digits."""
    model, examples = make_model("llama"), make_examples()
    _, gradients = accumulate(model, examples, var_objective)
    length = sum((g**2).sum() for g in gradients.values()).sqrt().item()
    losses, h = [], 1e-3
    for shift in (h, -h):
        moved = copy.deepcopy(model)
        for name, parameter in moved.named_parameters():
            parameter.data += shift * gradients[name] / length
        losses.append(accumulate(moved, examples, var_objective)[0])
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(length, rel=1e-3)


def test_sft_loss_equals_plain_transformers(make_model: Any, make_examples: Any, accumulate: Any) -> None:
    """The stock loss over labels with -100 for the prompt: the mean over all trained tokens of the batch."""
    model, examples = make_model("gpt2"), make_examples()
    loss, gradients = accumulate(model, examples, Sft())
    samples = [sample for example in examples for sample in example.samples]
    T = max(len(s.ids_T) for s in samples)
    ids, labels = torch.zeros(len(samples), T, dtype=torch.long), torch.full((len(samples), T), -100)
    for row, sample in enumerate(samples):
        own = torch.from_numpy(sample.ids_T.astype(np.int64))
        ids[row, : len(own)] = own
        labels[row, sample.start : len(own)] = own[sample.start :]
    model.zero_grad()
    expected = model(input_ids=ids, labels=labels).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)  # the stock loss itself is in float32
    assert_close(gradients, {n: p.grad for n, p in model.named_parameters()}, bound=1e-6)


class NarrowForward(PolicyForward):
    """The policy on a device with room for 40 tokens, which on its second pass has less: others use it too."""

    passes = 0

    def values(self, model: Any, micro: MicroBatch, slope_B: Any = None) -> Forwarded:
        self.passes += 1
        out = super().values(model, micro, slope_B)
        if out.num_tokens > (40 if self.passes != 2 else 1):
            raise torch.OutOfMemoryError(f"tried to hold {out.num_tokens} tokens")
        return out


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("budget", [10_000, 40])
def test_a_device_without_room_gives_the_gradients_of_one_with_room(
    layout: Layout, budget: int, make_model: Any, make_examples: Any, var_objective: Var, accumulate: Any
) -> None:
    """Budget 40: found out in the middle of a step, after another micro-batch has left its gradients."""
    examples = make_examples(5, num_responses=3)
    loss, expected = accumulate(make_model("llama"), examples, var_objective, layout=layout)
    narrow = NarrowForward(torch.device("cpu"), layout)
    got_loss, got = accumulate(
        make_model("llama"), examples, var_objective, budget=budget, layout=layout, forward=narrow
    )
    assert narrow.passes > 4
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert_close(got, expected, bound=1e-6)
