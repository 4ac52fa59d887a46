"""The profile of a benchmark result: everything that two scores must share to be comparable, and which model it was."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import torch

from evaluation.config import Backend, BenchmarkConfig
from training.config import Precision, Runtime
from training.model import digest_tokenizer, resolve_device

PROBE_FIRST, PROBE_LAST = 16, 8
DRAWS_OR_NAMES = {  # of a model's generation config: what greedy search does not ask for, and what is no setting
    "transformers_version", "_from_model_config", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "bos_token_id", "pad_token_id", "use_cache",
}  # fmt: skip

Row = dict[str, Any]


def describe(
    results: Row, *, config: BenchmarkConfig, model: Any, tasks: Mapping[str, Any], machine: Row, identity: Row
) -> Row:
    """Return the profile, of lm-eval's results, model and tasks, of the machine, and of which model it was.

    Under `model` stands what two policies may differ in; all else is compared before two scores are.
    """
    first = next(iter(tasks))
    ids = probe(model, results["samples"][first][0]["arguments"][0])
    tokenizer, template = model.tokenizer, model.tokenizer.chat_template if config.chat_template else None
    ours = config.backend == Backend.transformers
    exact = is_exact(config)
    return {
        "config": config.model_dump(mode="json", exclude={"endpoint"}),
        "backend": config.backend.value,
        "dtype": None if config.endpoint else str(model.model.dtype).removeprefix("torch."),
        "attention": model.model.config._attn_implementation if ours else None,
        "machine": machine,
        "generation_config": describe_generation(model.model) if ours and any_writes(tasks) else None,
        "batch_size": None if exact else model.engine.batch_size,
        "prefix_sharing": None if exact else [model.engine.shares_reading, model.engine.shares_writing],
        "max_length": model.max_length,
        "tokenizer_sha256": digest_tokenizer(tokenizer),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
        "multiturn": config.chat_template,
        "bos": {"id": tokenizer.bos_token_id, "count": ids.count(tokenizer.bos_token_id)},
        "probe": {"first": ids[:PROBE_FIRST], "last": ids[-PROBE_LAST:], "length": len(ids)},
        "truncated_prompts": model.watch.truncated,
        "data_sha256": digest_items(results["samples"], "doc_hash", "target_hash"),
        "prompts_sha256": digest_items(results["samples"], "prompt_hash"),
        "tasks": {name: describe_task(task, results, name=name) for name, task in tasks.items()},
        "model": identity,
    }


def is_exact(config: BenchmarkConfig) -> bool:
    """Tell whether no batch, shared prefix or kind of device moves a number by more than rounding; of a served model none is known."""
    return config.endpoint is not None or config.precision == Precision.float32


def describe_machine(config: BenchmarkConfig, *, runtime: Runtime) -> Row:
    """Return what numbers depend on besides a benchmark's config: the kind of device in half precision, and vLLM with its split.

    ValueError where vLLM is wanted and not installed.
    """
    found: Row = {}
    if not is_exact(config):
        device = resolve_device(runtime.device)
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if config.backend == Backend.vllm:
        found |= {"vllm": find_vllm(config.name), "tensor_parallel": runtime.workers}
    return found


def find_vllm(name: str) -> str:
    """Return the version of the installed vLLM."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"benchmark {name}: the backend vllm needs the package vllm, which is not installed here; install it on a machine with a GPU, "
            "or set the backend to transformers"
        ) from error


def any_writes(tasks: Mapping[str, Any]) -> bool:
    """Tell whether any task has answers written."""
    return any(task.get_config("output_type") == "generate_until" for task in tasks.values())


def describe_generation(model: Any) -> Row:
    """Return what a model's own generation config says that greedy search heeds, such as a penalty on repetition; stock heeds it too."""
    own = json.loads(model.generation_config.to_json_string(use_diff=True, ignore_metadata=True))
    told: Row = {name: value for name, value in own.items() if name not in DRAWS_OR_NAMES}
    ends = told.get("eos_token_id")
    return told | ({"eos_token_id": [ends]} if isinstance(ends, int) else {})


def describe_task(task: Any, results: Row, *, name: str) -> Row:
    """Return what a task is and how it was set."""
    fewshot = task.get_config("fewshot_config")
    return {
        "version": task.VERSION,
        "num_fewshot": task.get_config("num_fewshot"),
        "fewshot_source": {
            "split": task.get_config("fewshot_split"),
            "sampler": getattr(fewshot, "sampler", None),
            "given": getattr(fewshot, "samples", None) is not None,
        },
        "output_type": task.get_config("output_type"),
        "generation": task.get_config("generation_kwargs"),
        "filters": [f.name for f in task._filters],
        "items": results["n-samples"][name]["effective"],
    }


def digest_items(samples: Mapping[str, list[Row]], *fields: str) -> str:
    """Return a digest of some of the hashes that lm-eval logs with each item."""
    lines = (
        [task, item["doc_id"], item["filter"], *(item[field] for field in fields)]
        for task, items in samples.items()
        for item in items
    )
    return hashlib.sha256(json.dumps(list(lines)).encode()).hexdigest()


def probe(model: Any, request: tuple[str, Any]) -> list[int]:
    """Return the ids of one request, by the way on which the harness itself comes to them."""
    prompt, second = request
    if isinstance(second, str):
        prompt_ids, answer_ids = model._encode_pair(prompt, second)
        return [*prompt_ids, *answer_ids]
    ids: list[int] = model.tok_batch_encode([prompt])[0][0].tolist()
    return ids
