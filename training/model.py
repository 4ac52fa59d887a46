"""Causal language models on disk and in memory: local folders, safetensors, no code from outside."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache

from training.config import Device, Precision, Runtime
from training.tree import allow_variants
from training.weights import digest_weights

DTYPES = {Precision.float32: torch.float32, Precision.bfloat16: torch.bfloat16}
BATCH_STATE = ("padding", "truncation")  # of a tokenizer, left over from its last call
# How anything is read from a folder: nothing is fetched, and no code of it runs, whatever somebody answers at a terminal.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def start_torch(runtime: Runtime) -> torch.device:
    """Set the number of CPU threads, let matrix products add up in float32, and return the device to work on."""
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    # Else cuBLAS may add up parts of a product in bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return resolve_device(runtime.device)


def resolve_device(device: Device) -> torch.device:
    """Return the device to work on; `auto` takes an accelerator where there is one. ValueError where there is none to take."""
    if device == Device.cuda and not torch.cuda.is_available():
        raise ValueError(
            "device: got cuda, but torch sees no GPU here; expected a visible GPU; set runtime.device to cpu"
        )
    if device == Device.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device.value)


def load_policy(folder: Path, *, precision: Precision, device: torch.device) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a causal language model in a local folder, in evaluation mode (dropout 0).

    Weights are safetensors and no code of the folder runs. ValueError for a folder without weights or some of them, without tokenizer,
    for a tokenizer without chat template, and for one whose vocabulary is larger than the model's embedding.
    """
    tokenizer = load_tokenizer(folder)
    model = load_causal_model(folder, dtype=DTYPES[precision])
    return prepare_model(model, tokenizer, folder).to(device).eval(), tokenizer


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raise ValueError that names the folder for a file of a model that is no such file, or not of this model's sizes."""
    try:
        yield
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"model {folder}: a file of it cannot be read ({error}); expected whole files as save_pretrained writes them; copy or fetch them again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"model {folder}: its weights have other sizes than its config.json says; expected the configuration they were saved with; copy or "
            "fetch both again"
        ) from error


def load_causal_model(folder: Path, **options: Any) -> Any:
    """Return what AutoModelForCausalLM makes of a local folder's safetensors.

    ValueError where it would draw some of them, or not tie what the configuration says is tied.
    """
    with reading(folder):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, **LOCAL, use_safetensors=True, output_loading_info=True, **options
        )
    require_weights(loaded["missing_keys"], folder)
    refuse_unused(loaded["unexpected_keys"], model, folder)
    head, tied = model.get_output_embeddings(), model.config.get_text_config().tie_word_embeddings
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        refuse_two(folder)
    return model


def refuse_two(folder: Path) -> NoReturn:
    """Raise ValueError about an embedding and an output head that are to be one and are not: some programs take the one, some both."""
    raise ValueError(
        f"model {folder}: tie_word_embeddings is true, and its files have an embedding and an output head that differ; expected one for both; "
        "set it to false in config.json, if the model was trained so"
    )


def refuse_unused(names: Collection[str], model: Any, folder: Path) -> None:
    """Raise ValueError where tensors of a model's files, of its trunk, have no place in it: it would be another, smaller model. A head beside it
    is none of a reward model's, say, and what older programs stored of positions and masks is computed anew."""
    idle = [
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        r"rotary_emb\.inv_freq",
        r"\.attn\.(attention\.)?(masked_)?bias$",
    ]
    prefix = f"{model.base_model_prefix}."
    # Files of a trunk alone leave the prefix out; of those a numbered layer is what a smaller model has no place for.
    bare = bool(names) and not any(name.startswith(prefix) for name in list_stored(folder))
    trunk = [name for name in names if name.startswith(prefix) or (bare and re.search(r"\.\d+\.", name))]
    if names := [name for name in trunk if not any(re.search(pattern, name) for pattern in idle)]:
        raise ValueError(
            f"model {folder}: its files hold {len(names)} tensors that its config.json has no place for (first: {min(names)}), expected none: they "
            "would be left out; mend config.json (num_hidden_layers, say), or load and save the model to leave them out on purpose"
        )


def list_stored(folder: Path) -> set[str]:
    """Return the names of all tensors in a folder's safetensors files; ValueError for one that is in two of them: torch reads either, and
    transformers that of the index."""
    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with reading(folder), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in files:
                    raise ValueError(
                        f"model {folder}: {files[name]} and {path.name} both hold the tensor {name}; expected the files of one model; move the "
                        "others elsewhere"
                    )
                files[name] = path.name
    return set(files)


def require_weights(missing: Collection[str], folder: Path) -> None:
    """Raise ValueError where a model's files lack tensors of it, which transformers draws at random and only logs."""
    if missing:
        raise ValueError(
            f"model {folder}: its files have no weights for {len(missing)} tensors (first: {min(missing)}), expected all of them: what is "
            "not there would be random; save the whole model with save_pretrained, its output head too"
        )


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a policy's folder; ValueError as `load_policy`."""
    check_model_folder(folder)
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    if not tokenizer.chat_template:
        raise ValueError(
            f"model {folder}: the tokenizer has no chat template; expected one in tokenizer_config.json or "
            "chat_template.jinja; take the instruct version of the model or add its template"
        )
    return tokenizer


def prepare_model(model: Any, tokenizer: Any, folder: Path) -> Any:
    """Return the model, fit for the engine. ValueError for a vocabulary larger than its embedding, and for a model of more than text."""
    require_text(model.config, folder)
    check_vocabulary(model, tokenizer, folder)
    train_every_id(model)
    return model


def refuse_quantised(folder: Path) -> None:
    """Raise ValueError for a base in another number format than that of training: what transformers unpacks as it loads, it packs again
    as it saves, by the scales of the base, and under a config.json that no longer says so."""
    packed = read_config_file(folder / "config.json").get("quantization_config")
    if packed is not None:
        raise ValueError(
            f"model {folder}: got weights quantised by {packed.get('quant_method', 'a method without a name')}, expected plain ones to train; load "
            "it dequantised, delete quantization_config of its config and save it by save_pretrained(folder, save_original_format=False), or take "
            "the model that it was made of"
        )


def read_config_file(path: Path) -> Any:
    """Return what a JSON file of a model says; what is no number there (older programs wrote Infinity) as text, which can be written again."""
    with reading(path.parent):
        return json.loads(path.read_text(), parse_constant=str)


def train_every_id(model: Any) -> None:
    """Let the embedding of the pad id learn too: several tokenizers pad with their stop token, and no padding is read for anything."""
    model.get_input_embeddings().padding_idx = None  # which drops the gradient of that id


def require_text(config: Any, folder: Path) -> None:
    """Raise ValueError for the configuration of a model that reads images too: its language model is but a part of it."""
    if config.get_text_config() is not config:
        raise ValueError(
            f"model {folder}: model type {config.model_type} reads more than text; expected a language model alone; save the one within it as "
            "a model of its own (docs/models.md has the lines for Gemma 3)"
        )


def find_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a model of transformers, which it names itself as what is not to be split."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def require_layers(model: Any, *, setting: str) -> list[nn.Module]:
    """Return the layers of a model. ValueError that names the setting which needs them, where it names none."""
    layers = find_layers(model)
    if not layers:
        raise ValueError(
            f"runtime.{setting}: model type {model.config.model_type} names no layers; expected some in _no_split_modules; "
            "set it to false"
        )
    return layers


def prepare_layers(model: Any, runtime: Runtime, *, device: torch.device) -> None:
    """Let the layers of a policy that is to be trained run as the runtime says. ValueError where they cannot.

    Done before layers are sharded, so that a layer's weights are gathered once for all that it does.
    """
    if runtime.compile:
        compile_layers(model, device=device)
    if runtime.activation_checkpointing:
        checkpoint_activations(model)


def compile_layers(model: Any, *, device: torch.device) -> None:
    """Let every layer train as compiled code, one for all layers and lengths; attention (training/tree.py) stays as it is on a CPU.

    ValueError where a trial finds that nothing can be compiled for the device, and for a model that names no layers.
    """
    layers = require_layers(model, setting="compile")
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except RuntimeError as error:
        raise ValueError(
            f"runtime.compile: torch.compile fails here ({str(error).splitlines()[0]}); expected a working compiler (on a CPU "
            "g++ and the headers of Python); install it, or set runtime.compile to false"
        ) from error
    allow_variants()
    for layer in layers:
        layer.forward = partial(train_compiled, torch.compile(layer.forward, dynamic=True), layer.forward)


def train_compiled(compiled: Callable[..., Any], plain: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a layer, compiled where gradients are asked for: an answer's tokens come one by one, each with another cache."""
    return (compiled if torch.is_grad_enabled() else plain)(*arguments, **options)


def checkpoint_activations(model: Any) -> None:
    """Let every layer keep only what enters it, and compute the rest again when the backward pass needs it.

    The gradients are the same to the bit: the layer runs again on the same numbers, under the same random state. Done before
    layers are sharded, so that a layer's weights are gathered once for both. ValueError for a model that names no layers.
    """
    for layer in require_layers(model, setting="activation_checkpointing"):
        layer.forward = partial(keep_entry, layer.forward)


def keep_entry(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a layer, keeping for the backward pass what enters it alone; without gradients it is the layer as it is."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    # A cache would take the keys of the second run as more tokens.
    plain = [None if isinstance(value, Cache) else value for value in arguments]
    named: dict[str, Any] = {name: None if isinstance(value, Cache) else value for name, value in options.items()}
    return checkpoint(forward, *plain, use_reentrant=False, **named)


@dataclass(frozen=True)
class ModelDigests:
    """Which policy a number was computed with: its weights, and the chat template and tokenizer that make ids of messages."""

    weights_sha256: str
    template_sha256: str
    tokenizer_sha256: str


def digest_model(folder: Path, tokenizer: Any) -> ModelDigests:
    """Return the digests of a model folder: of its safetensors files by name, and of its tokenizer."""
    return ModelDigests(weights_sha256=digest_weights(folder), **digest_rendering(tokenizer))


def digest_rendering(tokenizer: Any) -> dict[str, str]:
    """Return the digests of what makes ids of messages: of a tokenizer's chat template, and of the tokenizer."""
    template = hashlib.sha256(tokenizer.get_chat_template().encode())
    return {"template_sha256": template.hexdigest(), "tokenizer_sha256": digest_tokenizer(tokenizer)}


def digest_tokenizer(tokenizer: Any) -> str:
    """Return 64 hex digits of SHA-256 over what a tokenizer does, the same however its files are written."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its vocabulary, and which class reads it
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
    what = {name: value for name, value in state.items() if name not in BATCH_STATE}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([what, special], sort_keys=True).encode()).hexdigest()


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Raise ValueError unless the folder holds a configuration, a tokenizer and, where they are wanted, safetensors weights."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model {folder}: no config.json; expected a folder as save_pretrained writes it; check the path"
        )
    if weights and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model {folder}: no weights; expected *.safetensors, got {sorted(p.name for p in folder.iterdir())}; "
            "convert other formats with save_pretrained"
        )
    # transformers puts an adapter into the model in some ways of loading it, and not in others.
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model {folder}: an adapter_config.json beside the weights; expected a model without an adapter; merge it into the weights first "
            "(PEFT's merge_and_unload), or move it elsewhere"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"model {folder}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}; copy it beside the weights"
        )


def check_vocabulary(model: Any, tokenizer: Any, folder: Path) -> None:
    """Raise ValueError when the tokenizer can produce an id that the embedding does not have.

    Special tokens that neither frame a text nor stand in the chat template are no matter: Gemma 3's tokenizer has one for images, which its
    models of text have no row for. A conversation that holds a special token by name is not rendered with it (training/render.py).
    """
    num_embeddings = model.get_input_embeddings().num_embeddings
    framing = {getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    idle = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special} - framing
    beyond = {
        token: token_id
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= num_embeddings and not (token in idle and token not in str(tokenizer.chat_template))
    }
    if beyond:
        raise ValueError(
            f"model {folder}: the tokenizer's largest id is {max(beyond.values())}, the embedding has {num_embeddings} rows; "
            "expected every id to be a row; tokenizer and weights are of different models"
        )


def save_policy(model: Any, tokenizer: Any, folder: Path, *, weights: dict[str, Tensor] | None = None) -> None:
    """Write configuration, safetensors weights and tokenizer to the top of `folder`, each file whole or not at all.

    `weights` are those of a model that holds only a part of them. Other files of the folder stay. A rerun after a kill
    overwrites what the first attempt left.
    """
    stage = folder / ".partial"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    model.save_pretrained(stage, state_dict=weights)
    tokenizer.save_pretrained(stage)
    for path in sorted(stage.iterdir()):
        path.replace(folder / path.name)
    stage.rmdir()


def find_context(config: Any, model: Any = None) -> int | None:
    """Return how many tokens a model of a config takes; None where nothing bounds them."""
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT's name
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    padding_idx = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    if context is not None and padding_idx is not None:  # RoBERTa counts positions from behind that of padding
        context -= padding_idx + 1
    return context


def check_context(model: Any, max_tokens: int, *, setting: str = "max_tokens") -> None:
    """Raise ValueError, which names the setting, when rows may be longer than the positions the model has."""
    context = find_context(model.config, model)
    if context is not None and max_tokens > context:
        raise ValueError(
            f"{setting}: got {max_tokens}, the model {model.config.model_type} has a context of {context} tokens; "
            f"set {setting} to {context} or less"
        )
