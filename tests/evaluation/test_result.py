"""Which results may be compared: those whose profiles agree in all but the model."""

from typing import Any

import pytest

from evaluation.harness.result import BenchmarkResult, pair_items

PROFILE: dict[str, Any] = {
    "config": {"num_fewshot": 0, "limit": None, "harness": "0.4.13"},
    "tokenizer_sha256": "a",
    "prompts_sha256": "b",
    "bos": {"id": 1, "count": 1},
    "prefix_sharing": None,
    "model": {"weights_sha256": "one"},
}


def result(**changes: Any) -> BenchmarkResult:
    return BenchmarkResult(benchmark="bbh", scores=(), items={("t", "0"): 1.0}, profile=PROFILE | changes)


def test_two_models_under_one_profile_are_compared() -> None:
    ours, theirs = pair_items(result(), result(model={"weights_sha256": "two"}))
    assert ours.tolist() == theirs.tolist() == [1.0]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"config": PROFILE["config"] | {"limit": 8}}, r"config\.limit is null and 8"),
        ({"config": PROFILE["config"] | {"harness": "0.4.14"}}, r'config\.harness is "0\.4\.13" and "0\.4\.14"'),
        ({"tokenizer_sha256": "c"}, r'tokenizer_sha256 is "a" and "c"'),
        ({"prompts_sha256": "c"}, r'prompts_sha256 is "b" and "c"'),
        ({"bos": {"id": 1, "count": 0}}, r"bos\.count is 1 and 0"),
        ({"prefix_sharing": [True, False]}, r"prefix_sharing is null and \[true, false\]"),
    ],
)
def test_a_difference_in_anything_else_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"scores of different profiles are never compared; .*{field}"):
        pair_items(result(), result(**changes))
