"""Small real models, made here in a second, and the folder of real rows."""

import os
from pathlib import Path

import pytest

# the fixtures `s3`, `stack` and `hub`: real servers; `ranks`: real processes; `hosts`: real networks; started when a test asks for them
pytest_plugins = ["tests.stack_fixture", "tests.ranks", "tests.hosts", "tests.chromium_fixture", "tests.hub_fixture"]

REAL_DATA_VARIABLE = "VARFLOW_TEST_DATA"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "How do I bake bread? Mix flour, water, salt and yeast, knead it, let it rise, and bake it for half an hour.",
    "user assistant system\n Please explain why the sky is blue. Sunlight is scattered by the air, blue light most.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12. I am sorry, I can not help with that, but here is what you could do.",
)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a two-layer random Llama with a byte-level tokenizer and a chat template; bos, eos and pad are three ids.

    The answer ends with eos `<|im_end|>`, after which the template writes a line break that no model should learn.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_policy")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_end|>", "<pad>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.15,  # sharper than the default, so that greedy choices are no near-ties
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a two-layer random Bert with one label and a WordPiece tokenizer for text pairs."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_reward_model")
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(CORPUS, vocab_size=384, show_progress=False)
    tokenizer = BertTokenizerFast(vocab=pieces.get_vocab(), model_max_length=256)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real rows (HH-RLHF, GSM8K, MMLU ...), or leave the test out and say so."""
    value = os.environ.get(REAL_DATA_VARIABLE)
    if not value:
        pytest.skip(f"needs real rows: set {REAL_DATA_VARIABLE} to the folder that holds hh-rlhf/, gsm8k/, mmlu/")
    folder = Path(value)
    assert folder.is_dir(), f"{REAL_DATA_VARIABLE}={value}: no such folder"
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests on real rows were left out because nobody named the folder."""
    if os.environ.get(REAL_DATA_VARIABLE):
        return
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if REAL_DATA_VARIABLE in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests on real rows were left out: set {REAL_DATA_VARIABLE} to their folder", yellow=True
        )
