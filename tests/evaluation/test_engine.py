"""The engine against lm-eval's own Transformers backend, on small random models of every architecture that we are held to."""

import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evaluation.harness.calls import Row, plan_groups
from evaluation.harness.engine import TransformersEngine
from evaluation.harness.run import PolicyLM
from evaluation.harness.watch import Watch
from evaluation.responses import Responses
from tests.architectures import CONFIGS, make_model

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,"
LONGEST = 64  # positions of the smallest model
SHARED = "ask and answer. "
WINDOWS = {"mistral", "gemma2", "gemma3"}  # attention of six tokens


def make_tokenizer() -> Any:
    """Return a tokenizer of single letters: any text of them is as many ids."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: number for number, letter in enumerate(LETTERS, start=2)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path / "metrics.jsonl", stop=threading.Event())


@pytest.fixture
def ours(architecture: str, watch: Watch, tmp_path: Path) -> Iterator[PolicyLM]:
    responses = Responses(tmp_path / "responses.jsonl", identity=architecture)
    yield PolicyLM(watch=watch, responses=responses, **settings(architecture))
    responses.close()


@pytest.fixture
def stock(architecture: str) -> HFLM:
    return HFLM(**settings(architecture))


def settings(architecture: str) -> dict[str, Any]:
    model = make_model(architecture)
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = 1, None
    return {
        "pretrained": model,
        "tokenizer": make_tokenizer(),
        "batch_size": 4,
        "max_length": LONGEST,
        "backend": "causal",
    }


def make_requests(kind: str, pairs: list[tuple[str, Any, str]]) -> list[Instance]:
    """Return one request for each (prompt, continuation or settings, task)."""
    return [
        Instance(request_type=kind, doc={}, arguments=(prompt, second), idx=0, metadata=(task, number, 1))
        for number, (prompt, second, task) in enumerate(pairs)
    ]


def draw_texts(count: int, *, seed: int, longest: int) -> list[str]:
    drawn = random.Random(seed)
    return ["".join(drawn.choices(LETTERS[:52], k=drawn.randint(3, longest))) for _ in range(count)]


def choice_pairs() -> list[tuple[str, Any, str]]:
    """One task with worked examples, one without a common word; one token to choose, or a few; one prompt too long."""
    shared = [
        (SHARED * 2 + text, f" {letter}", "shot") for text in draw_texts(6, seed=1, longest=12) for letter in "ABC"
    ]
    free = [(text, word, "free") for text in draw_texts(5, seed=2, longest=20) for word in ("yes", "no", "perhaps")]
    return [*shared, *free, (LETTERS + LETTERS, "no", "shot"), ("", "yes", "free")]


def test_log_probabilities_are_those_of_stock(ours: PolicyLM, stock: HFLM, architecture: str) -> None:
    assert ours.engine.shares_reading
    requests = make_requests("loglikelihood", choice_pairs())
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    got = ours.loglikelihood(requests)
    assert len(got) == len(requests)
    for (logp, greedy), (stock_logp, stock_greedy) in zip(got, expected, strict=True):
        assert logp == pytest.approx(stock_logp, abs=1e-4)
        assert greedy == stock_greedy
    assert ours.watch.truncated == 1


@pytest.mark.parametrize("until", [["k"], ["Zq", "K", "of"], []], ids=["one", "several", "none"])
def test_texts_are_those_of_stock(ours: PolicyLM, stock: HFLM, architecture: str, until: list[str]) -> None:
    assert ours.engine.shares_writing == (architecture not in WINDOWS)
    how = {"until": until, "max_gen_toks": 20, "do_sample": False}
    pairs = [(SHARED + text, dict(how), "shot") for text in draw_texts(6, seed=3, longest=12)]
    pairs += [(text, dict(how), "free") for text in draw_texts(5, seed=4, longest=25)]
    pairs.append((LETTERS, dict(how), "shot"))  # cut to fit
    requests = make_requests("generate_until", pairs)
    assert ours.generate_until(requests) == stock.generate_until(requests, disable_tqdm=True)
    assert ours.watch.truncated == 1


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_row_leaves_the_batch_at_its_own_stop(ours: PolicyLM, stock: HFLM, watch: Watch) -> None:
    prompts = draw_texts(4, seed=5, longest=9)
    free = ours.generate_until(make_requests("generate_until", [(p, {"max_gen_toks": 40}, "t") for p in prompts]))
    stops = [free[0][6], free[1][12], free[2][3]]
    how = {"until": stops, "max_gen_toks": 40}
    requests = make_requests("generate_until", [(prompt, dict(how), "t") for prompt in prompts])
    watch.cut.clear()
    sizes: dict[str, list[int]] = {"ours": [], "stock": []}
    for name, lm in (("ours", ours), ("stock", stock)):
        lm.model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: sizes[name].append(len(args[0] if args else kwargs["input_ids"])),
            with_kwargs=True,
        )
    texts = ours.generate_until(requests)
    assert texts == stock.generate_until(requests, disable_tqdm=True)
    assert len(watch.cut) < 4, "else this shows nothing"
    assert sizes["ours"] == sorted(sizes["ours"], reverse=True), "rows leave and none comes back"
    assert sizes["ours"][0] == 4 and sizes["ours"][-1] < 4
    assert sum(sizes["ours"]) < sum(sizes["stock"]) == 4 * len(sizes["stock"])


@pytest.mark.parametrize("architecture", ["llama"])
def test_answers_that_the_limit_ended_are_known(ours: PolicyLM) -> None:
    requests = make_requests("generate_until", [("abc", {"until": [], "max_gen_toks": 3}, "t")])
    ours.generate_until(requests)
    assert ours.watch.cut == {"abc"}


@pytest.mark.parametrize("architecture", ["llama"])
def test_sampling_is_left_to_stock(ours: PolicyLM, stock: HFLM) -> None:
    how = {"until": ["k"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = make_requests("generate_until", [("abc", how, "t"), ("bcd", how, "t")])
    torch.manual_seed(0)
    expected = stock.generate_until(requests, disable_tqdm=True)
    torch.manual_seed(0)
    assert ours.generate_until(requests) == expected


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_batch_without_room_is_halved_only_where_its_size_moves_no_number(ours: PolicyLM) -> None:
    engine = ours.engine
    assert isinstance(engine, TransformersEngine)

    def work(rows: Sequence[Row]) -> list[int]:
        if len(rows) > 1:
            raise torch.OutOfMemoryError("as a device without room says it")
        return [len(row.ids) for row in rows]

    rows = [Row([1, 2]), Row([3])]
    assert engine._run(work, rows) == [2, 1]
    engine.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"batch_size: a batch of .* in torch.bfloat16 has no room"):
        engine._run(work, rows)


def test_a_prefix_is_read_once_only_where_that_saves_tokens() -> None:
    shot = [Row([1, 2, 3, 4, 5, 6, 7, 8, 20 + n], task="shot") for n in range(5)]
    free = [Row([30 + n, 1, 2, 3], task="free") for n in range(3)]
    (group, pooled) = plan_groups([*shot, *free], batch_size=2, share=True)
    assert group.prefix == [1, 2, 3, 4, 5, 6, 7, 8]
    assert group.batches == [[0, 1], [2, 3], [4]]
    assert (pooled.prefix, sorted(n for batch in pooled.batches for n in batch)) == ([], [5, 6, 7])
    (alone,) = plan_groups([*shot, *free], batch_size=2, share=False)
    assert (alone.prefix, alone.batches[0]) == ([], [0, 1])


def test_no_position_that_is_scored_belongs_to_the_prefix() -> None:
    rows = [Row([1, 2, 3, 4, 5, 6, 7, 8, 9, last], ((9, last, 5),), task="t") for last in (1, 2, 3)]
    assert plan_groups(rows, batch_size=2, share=True)[0].prefix == [1, 2, 3, 4, 5, 6, 7]


def test_a_model_that_cannot_tell_padding_shares_nothing_when_it_writes() -> None:
    engine = TransformersEngine(make_model("mistral"), make_tokenizer(), batch_size=2)
    assert engine.shares_reading and not engine.shares_writing
