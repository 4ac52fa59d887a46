"""Log-probabilities: equal to the whole model's log-softmax, in value and gradient, for every family, chunk and padding."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import profile
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from tests.architectures import HEADS, SMALL, make_model
from training import head as head_module
from training.data.batch import MicroBatch, collate
from training.head import CHUNK_ELEMENTS, ChunkedLogp, WeightedLogp
from training.logprobs import check_head, sum_logps, weigh_logps
from training.render import Rendered

CPU = torch.device("cpu")
PLAIN = ("llama", "qwen2", "qwen3", "gpt2")


def make_samples() -> list[Rendered]:
    rng = np.random.default_rng(0)
    return [
        Rendered(ids_T=rng.integers(0, 61, size=size).astype(np.int32), start=start)
        for size, start in ((9, 4), (14, 13), (5, 1), (12, 6))
    ]


def plain_logps(model: Any, samples: list[Rendered]) -> torch.Tensor:
    """Each sequence alone, the whole vocabulary at every position."""
    sums = []
    for sample in samples:
        ids = torch.from_numpy(sample.ids_T.astype(np.int64))[None]
        logp = model(input_ids=ids).logits.log_softmax(dim=-1)[0]
        sums.append(sum(logp[t - 1, ids[0, t]] for t in range(sample.start, len(sample.ids_T))))
    return torch.stack(sums)


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("chunk_elements", [61 * 3, 2**24])
def test_values_and_gradients_equal_the_plain_ones(
    name: str, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", chunk_elements)
    model, samples = make_model(name, dtype=torch.float64), make_samples()
    weights = torch.tensor([0.3, 2.0, 0.0, 1.7], dtype=torch.float64)
    expected = plain_logps(model, samples)
    expected_gradients = gradients(model, (weights * expected).sum())
    # The stock Llama norm computes in float32, hence the looser bound there.
    bound = 1e-10 if name == "gpt2" else 2e-5
    micro = collate(samples, device=CPU)
    plain = sum_logps(model, micro)
    weighted, numbers = weigh_logps(model, micro, weights.numpy())
    assert not numbers.requires_grad and torch.allclose(weighted, (weights * expected).sum(), rtol=0, atol=4 * bound)
    for got, loss in ((plain, (weights * plain).sum()), (numbers, weighted)):
        got_gradients = gradients(model, loss)
        assert torch.allclose(got, expected, rtol=0, atol=bound)
        assert len(got_gradients) == len(expected_gradients) > 0
        for a, b in zip(got_gradients, expected_gradients, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_right_and_no_padding_agree(name: str) -> None:
    model, samples = make_model(name, dtype=torch.float64), make_samples()
    alone = torch.cat([sum_logps(model, collate([samples[i]], device=CPU)) for i in range(4)])
    right = sum_logps(model, collate(samples, device=CPU))
    left = sum_logps(model, pad_left(samples))
    assert torch.allclose(right, alone, rtol=0, atol=1e-10 if name == "gpt2" else 2e-5)
    assert torch.allclose(left, alone, rtol=0, atol=1e-10 if name == "gpt2" else 2e-5)


def pad_left(samples: list[Rendered]) -> MicroBatch:
    T = max(len(s.ids_T) for s in samples)
    ids, mask = torch.zeros(len(samples), T, dtype=torch.long), torch.zeros(len(samples), T, dtype=torch.long)
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


def test_chunked_logp_passes_finite_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, 3, 3, 1])
    slope = torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    for given in (bias, None):
        assert torch.autograd.gradcheck(ChunkedLogp.apply, (hidden, weight, given, target))
        parts = [part for part in (hidden, weight, given) if part is not None]
        expected = torch.autograd.grad(3 * (slope * ChunkedLogp.apply(hidden, weight, given, target)).sum(), parts)
        got = torch.autograd.grad(3 * WeightedLogp.apply(slope, hidden, weight, given, target)[0], parts)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-14)


def take(logp: str, slope: torch.Tensor, *parts: Any) -> torch.Tensor:
    """Return logp_P, with the gradients of sum slope logp in what the parts of a head are made of: in either way."""
    if logp == "weighted":
        weighted, found = WeightedLogp.apply(slope.double(), *parts)
        weighted.backward()
    else:
        found = ChunkedLogp.apply(*parts)
        found.backward(slope.to(found.dtype))
    return found.detach()


@pytest.mark.parametrize("logp", ["weighted", "chunked"])
def test_in_bfloat16_chunks_add_up_as_one_does(logp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's gradient over 64 chunks, against float64 on the same rounded operands: a sum kept in 8 bits was off by 1 % of the largest."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 8), torch.randn(61, 8)
    target = torch.arange(512) % 61

    def differentiate(chunk: int, *, dtype: torch.dtype, narrow: bool) -> torch.Tensor:
        monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 61 * chunk)
        head = weight.bfloat16().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            take(logp, torch.ones(512), hidden.bfloat16().to(dtype), head, None, target)
        assert head.grad is not None and head.grad.dtype == dtype
        return head.grad

    exact = differentiate(512, dtype=torch.float64, narrow=False)
    one, many = (differentiate(chunk, dtype=torch.float32, narrow=True) for chunk in (512, 8))
    scale = exact.abs().max()
    for got in (one, many):
        assert (got - exact).abs().max() / scale < 3e-3
    assert (many - one).abs().max() / scale < 3e-3


@pytest.mark.parametrize("chunk_elements", [1, 61 * 3, 61 * 7 + 5, 2**24])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("logp", ["weighted", "chunked"])
def test_bfloat16_rounds_logits_and_their_gradients_once(
    chunk_elements: int, softcap: float | None, biased: bool, logp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 on the same rounded operands: a logit moves by 2^-9 of itself, so a log-probability by twice that of the largest
    logit. Gradients leave through one rounded matrix product more. Chunks of one position, of three (16 are no multiple), of one vocabulary
    and some, and of all."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", chunk_elements)
    torch.manual_seed(0)
    hidden, weight = torch.randn(16, 32).bfloat16(), torch.randn(61, 32).bfloat16()
    bias, target, grad = torch.randn(61), torch.arange(16) * 7 % 61, torch.randn(16)

    def run(dtype: torch.dtype, *, narrow: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        operands = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            found = take(logp, grad, *operands[:2], operands[2] if biased else None, target, softcap)
        return found, [operand.grad for operand in operands if operand.grad is not None]

    exact, exact_gradients = run(torch.float64, narrow=False)
    got, got_gradients = run(torch.float32, narrow=True)
    assert got.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in got_gradients)
    largest = (hidden.double() @ weight.double().T).abs().max()
    assert 0 < (got - exact).abs().max() <= 2 * 2**-9 * largest
    assert len(got_gradients) == len(exact_gradients) == 2 + biased
    for a, b in zip(got_gradients, exact_gradients, strict=True):
        assert (a - b).abs().max() <= 2e-2 * b.abs().max() and (a - b).mean().abs() <= 2e-3 * b.abs().max()


def test_the_log_sum_of_bfloat16_logits_is_taken_in_float32() -> None:
    """Of equal logits over 50 000 tokens it is log 50 000 = 10.8198; bfloat16 has 10.8125 there, and a sum kept in it ends at 256."""
    hidden, weight = torch.zeros(3, 8), torch.randn(50_000, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = ChunkedLogp.apply(hidden, weight, None, torch.tensor([0, 7, 49_999]))
    assert logp.dtype == torch.float32
    assert (logp.double() + np.log(50_000)).abs().max() < 2e-6


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_logit_of_a_weighted_sum_is_computed_twice(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten positions in chunks of at most three are four matrix products, and none in the backward pass; its second one is an error."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 61 * 3)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(61, 8, requires_grad=True)

    def count(work: Callable[[], Any]) -> tuple[Any, int]:
        with profile(record_shapes=True) as seen:
            out = work()
        return out, sum(event.input_shapes[-1] == [8, 61] for event in seen.events() if event.name == "aten::mm")

    slope = torch.ones(10, dtype=torch.float64)
    (loss, _), forward = count(lambda: WeightedLogp.apply(slope, hidden, weight, None, torch.arange(10), softcap))
    _, backward = count(lambda: torch.autograd.grad(loss, (hidden, weight), retain_graph=True))
    assert (forward, backward) == (4, 0)
    with pytest.raises(RuntimeError, match="its first backward pass"):
        torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("logp", ["weighted", "chunked"])
def test_never_holds_positions_times_vocabulary(logp: str) -> None:
    """Every tensor made in forward and backward stays at or under a chunk, or the head's own size: of SmolLM2's vocabulary and a step of eight
    pairs, as the benchmark has them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    P, H, V = 900, 4, 49_152
    hidden = torch.randn(P, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    with Largest() as largest:
        take(logp, torch.ones(P), hidden, weight, None, torch.zeros(P, dtype=torch.long))
    assert largest.elements <= CHUNK_ELEMENTS["cpu"] < P * V


@pytest.mark.parametrize("logp", ["weighted", "chunked"])
def test_one_chunk_of_logits_is_alive_at_a_time(logp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven chunks; whatever looks at one's logits finds no other's."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 61 * 3)
    found = []

    def look(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            alive = (o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.shape == (3, 61))
            found.append(len({tensor.untyped_storage().data_ptr() for tensor in alive}))
            return work(*arguments)

        return run

    for name in ("pick_logps", "weigh_logits"):
        monkeypatch.setattr(head_module, name, look(getattr(head_module, name)))
    hidden, weight = torch.randn(21, 8, requires_grad=True), torch.randn(61, 8, requires_grad=True)
    take(logp, torch.ones(21), hidden, weight, None, torch.arange(21))
    assert found == [1] * (7 if logp == "weighted" else 14)


def test_float32_stays_close_to_float64_and_keeps_its_type() -> None:
    samples = make_samples()
    wide, narrow = make_model("gpt2", dtype=torch.float64), make_model("gpt2")
    got = sum_logps(narrow, collate(samples, device=CPU))
    assert torch.allclose(got, sum_logps(wide, collate(samples, device=CPU)), rtol=1e-5, atol=1e-4)
    (-got.sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in narrow.parameters())


def test_capped_logits_are_those_of_the_model() -> None:
    """Gemma 2 caps its logits behind the head and its attention scores before the softmax."""
    torch.manual_seed(0)
    config = Gemma2Config(
        **{**SMALL, **HEADS, "initializer_range": 1.0}, final_logit_softcapping=2.0, attn_logit_softcapping=3.0
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    check_head(model)
    samples = make_samples()
    expected = plain_logps(model, samples)
    got = sum_logps(model, collate(samples, device=CPU))
    assert torch.allclose(got, expected, rtol=0, atol=2e-4)  # the stock norm computes in float32
    plain = gradients(model, expected.sum())
    for a, b in zip(gradients(model, sum_logps(model, collate(samples, device=CPU)).sum()), plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_chunked_logp_with_a_cap_passes_finite_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ChunkedLogp.apply, (hidden, weight, None, torch.tensor([0, 6, 3, 3, 1]), 1.5))


def test_scaled_logits_are_refused_by_name() -> None:
    for name in PLAIN:
        check_head(make_model(name))
    torch.manual_seed(0)
    scaled = AutoModelForCausalLM.from_config(CohereConfig(**SMALL, logit_scale=0.25))
    with pytest.raises(ValueError, match=r"cohere.*scaled"):
        check_head(scaled.eval())
