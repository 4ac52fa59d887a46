"""A tokenizer's digest says what it does, and not how its files were written or how it was last called."""

from pathlib import Path

from transformers import AutoTokenizer, ByT5Tokenizer

from training.model import digest_tokenizer


def test_a_tokenizer_is_the_same_when_saved_again_and_after_use(tiny_policy: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    digest = digest_tokenizer(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert digest_tokenizer(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path)
    assert digest_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == digest


def test_another_token_is_another_tokenizer(tiny_policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    digest = digest_tokenizer(tokenizer)
    tokenizer.add_tokens(["zebra"])
    assert digest_tokenizer(tokenizer) != digest


def test_a_tokenizer_written_in_python_has_a_digest_too() -> None:
    digest = digest_tokenizer(ByT5Tokenizer())
    assert digest == digest_tokenizer(ByT5Tokenizer()) != digest_tokenizer(ByT5Tokenizer(extra_ids=3))
