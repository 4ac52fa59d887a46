"""Run one benchmark with lm-eval's stock tasks, offline, and turn what it returns into rows of our own.

This is the one file that knows lm-eval. Nothing of a task is changed but what the config names (shots, seed, answer cap, item
limit), in the way of `lm_eval.simple_evaluate`, so that the numbers are those of `python -m lm_eval` to the last digit. It is
called below that function, since that one spends seconds on a report of the machine and ends with a result file of its own.

What is added stands beside the numbers: each forward pass looks at the stop request and at the ids it is given, each finished
request is a step of progress, and HumanEval's `code_eval`, which would fetch code from the hub and run model-written programs
in this very process, is replaced by the sandbox before the task is loaded.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import evaluate as hf_evaluate
import huggingface_hub.constants
import lm_eval.tasks
import numpy as np
import transformers
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import set_torch_seed

from evaluation.config import BenchmarkConfig
from evaluation.samples import score_rows, write_samples
from evaluation.sandbox import SandboxedCodeEval, check_sandbox
from evaluation.watch import Watch
from training.config import Precision, Runtime
from training.job import write_json
from training.model import check_model_folder, resolve_device

HARNESS_VERSION = importlib.metadata.version("lm_eval")
STOCK_FOLDERS = (
    "mmlu/default",
    "gsm8k",
    "humaneval",
    "bbh",
)  # what a mirror can serve; the whole index takes ten seconds
HUMANEVAL_MODULE = "lm_eval.tasks.humaneval.utils"
TYPICAL_PROMPT_TOKENS = 256  # the default budget of 2,048 tokens makes batches of 8
PROBE_FIRST, PROBE_LAST = 16, 8
POSITIONS = "max_position_embeddings"
RANDOM_SEED, NUMPY_SEED, TORCH_SEED = 0, 1234, 1234  # of lm-eval's command line

Row = dict[str, Any]


def evaluate(
    model_folder: Path,
    mirror: Path,
    config: BenchmarkConfig,
    *,
    runtime: Runtime,
    output: Path,
    work: Path,
    stop: threading.Event,
) -> list[Row]:
    """Return the score rows of one benchmark (docs/architecture.md) and write its samples, profile and metrics.

    `work` takes the harness's copies of the data. Raises Interrupted within one forward pass of `stop` being set, and
    ValueError for a config that the tasks or the model cannot meet, before any item is answered where that can be known.
    """
    check_request(config, model_folder=model_folder)
    with offline(work / "datasets"):
        tasks = load_tasks(config, mirror=mirror)
        configure_tasks(tasks, config=config)
        check_tasks(tasks, config=config)
        watch = Watch(output / "metrics.jsonl", stop=stop)
        model = load_model(model_folder, config=config, runtime=runtime, watch=watch)
        random.seed(RANDOM_SEED)
        np.random.seed(NUMPY_SEED)
        set_torch_seed(TORCH_SEED)
        results = run_harness(
            model,
            {"tasks": tasks},
            limit=config.limit,
            system_instruction=config.system_prompt,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.chat_template,
            confirm_run_unsafe_code=True,  # in the sandbox, that is
        )
    rows = score_rows(results, config=config, harness_version=HARNESS_VERSION)
    write_samples(results["samples"], output / "samples.jsonl", config=config)
    write_json(output / "profile.json", describe(results, config=config, model=model, tasks=tasks))
    return rows


def check_request(config: BenchmarkConfig, *, model_folder: Path) -> None:
    """Raise ValueError for what can be refused before weights and data are loaded."""
    check_model_folder(model_folder)
    positions = getattr(transformers.AutoConfig.from_pretrained(model_folder, local_files_only=True), POSITIONS, None)
    if positions is not None and positions < config.max_length:
        raise ValueError(
            f"benchmark {config.name}: max_length is {config.max_length}, but the model {model_folder} has {positions} "
            "positions; lower max_length"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    if config.chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"benchmark {config.name}: asks for the chat template, but the tokenizer of {model_folder} has none; "
            "set chat_template to false, or take a model with one"
        )
    if config.system_prompt is not None and not config.chat_template:
        raise ValueError(
            f"benchmark {config.name}: a system prompt without the chat template; set chat_template, or leave it out"
        )
    if any(task.startswith("humaneval") for task in config.tasks):
        check_sandbox()


@contextlib.contextmanager
def offline(cache: Path) -> Iterator[None]:
    """Keep the Hugging Face libraries from the network, and their copies of the data in `cache`, emptied first.

    `datasets` knows a copy by the relative path of its source: a shared cache serves one mirror's rows for another's.
    """
    shutil.rmtree(cache, ignore_errors=True)
    before = (
        huggingface_hub.constants.HF_HUB_OFFLINE,
        datasets.config.HF_HUB_OFFLINE,
        datasets.config.HF_DATASETS_CACHE,
    )
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_CACHE = cache
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before[:2]
        datasets.config.HF_DATASETS_CACHE = before[2]


def load_tasks(config: BenchmarkConfig, *, mirror: Path) -> dict[str, Any]:
    """Return lm-eval's task objects by name, groups taken apart, their rows read from the mirror."""
    stock = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[stock / name for name in STOCK_FOLDERS])
    for name in config.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            raise ValueError(
                f"benchmark {config.name}: lm-eval {HARNESS_VERSION} has no task {name!r} among MMLU, GSM8K, HumanEval and "
                f"BBH; nearest: {', '.join(near) or 'none'}; correct `tasks`"
            )
    with contextlib.chdir(mirror), sandboxed_code_eval(seconds=config.sandbox_seconds):
        loaded: dict[str, Any] = manager.load(list(config.tasks))["tasks"]
    return loaded


@contextlib.contextmanager
def sandboxed_code_eval(*, seconds: float) -> Iterator[None]:
    """While tasks are loaded, `evaluate.load("code_eval")` returns the sandboxed one, and nothing else can be loaded.

    lm-eval keeps the modules of its tasks, and HumanEval's takes its metric when it is first loaded; so it is forgotten.
    """
    original = hf_evaluate.load
    sys.modules.pop(HUMANEVAL_MODULE, None)

    def load(name: str, *_: Any, **__: Any) -> SandboxedCodeEval:
        if name != "code_eval":
            raise ValueError(f"metric {name!r}: would be fetched from the hub; take a task whose metrics lm-eval holds")
        return SandboxedCodeEval(seconds=seconds)

    hf_evaluate.load = load
    try:
        yield
    finally:
        hf_evaluate.load = original


def configure_tasks(tasks: dict[str, Any], *, config: BenchmarkConfig) -> None:
    """Set shots, few-shot seed and answer cap, by the rules of `lm_eval.simple_evaluate`: a task's own 0 shots stay 0."""
    for task in tasks.values():
        if config.max_gen_toks is not None and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": config.max_gen_toks}, update=True)
        own = task.get_config("num_fewshot")
        if own is None or (config.num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
        task.set_fewshot_seed(seed=config.seed)


def check_tasks(tasks: dict[str, Any], *, config: BenchmarkConfig) -> None:
    """Raise ValueError when a task lacks the filter, the metric or the shots that the config names."""
    for name, task in tasks.items():
        filters = [f.name for f in task._filters]
        metrics = list(task._metric_fn_list)
        own = task.get_config("num_fewshot")
        wrong = None
        if config.filter not in filters:
            wrong = f"has no filter {config.filter!r}, expected one of {', '.join(filters)}"
        elif config.metric not in metrics and "pass_at_k" not in metrics:  # whose names it gives with its values
            wrong = f"has no metric {config.metric!r}, expected one of {', '.join(metrics)}"
        elif config.num_fewshot is not None and own != config.num_fewshot:
            wrong = f"takes {own} shots and no other number, got {config.num_fewshot}"
        elif task.get_config("output_type") == "generate_until" and answer_cap(task) >= config.max_length:
            wrong = f"generates {answer_cap(task)} tokens, which at max_length {config.max_length} leaves no room for a prompt"
        if wrong:
            raise ValueError(f"benchmark {config.name}: the task {name} {wrong}; correct the benchmark's settings")


def answer_cap(task: Any) -> int:
    """Return the most tokens that a generating task may answer with."""
    return int(task.get_config("generation_kwargs").get("max_gen_toks", DEFAULT_MAX_GEN_TOKS))


class WatchedLM(HFLM):
    """lm-eval's Transformers backend, telling a Watch what it does. It computes nothing itself."""

    def __init__(self, *, watch: Watch, **settings: Any) -> None:
        super().__init__(**settings)
        self.watch = watch
        watch.bos = self.tokenizer.bos_token_id
        self.model.register_forward_pre_hook(watch.before_forward, with_kwargs=True)
        self.set_cache_hook(watch)

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        self.watch.expect(len(requests))
        self.watch.truncated += sum(len(prompt) + len(answer) > self.max_length + 1 for _, prompt, answer in requests)
        return super()._loglikelihood_tokens(requests, **options)

    def generate_until(self, requests: Any, **options: Any) -> Any:
        self.watch.expect(len(requests))
        for prompt, settings in (request.args for request in requests):
            room = self.max_length - settings.get("max_gen_toks", self.max_gen_toks)
            self.watch.truncated += len(self.tok_batch_encode([prompt])[0][0]) > room
        return super().generate_until(requests, **options)


def load_model(folder: Path, *, config: BenchmarkConfig, runtime: Runtime, watch: Watch) -> WatchedLM:
    """Return the policy behind lm-eval's interface: safetensors, local files, one device, a fixed batch size."""
    return WatchedLM(
        watch=watch,
        pretrained=str(folder),
        backend="causal",
        device=resolve_device(runtime.device).type,  # left to itself it asks for a GPU
        dtype=config.precision.value,
        batch_size=max(1, runtime.microbatch_tokens // TYPICAL_PROMPT_TOKENS),
        max_length=config.max_length,
        use_safetensors=True,
        local_files_only=True,
    )


def describe(results: Row, *, config: BenchmarkConfig, model: WatchedLM, tasks: dict[str, Any]) -> Row:
    """Return the profile: everything that two scores must share to be comparable, save the digests of model and mirror."""
    first = next(iter(tasks))
    ids = probe(model, results["samples"][first][0]["arguments"][0])
    template = model.tokenizer.chat_template if config.chat_template else None
    return {
        "config": config.model_dump(mode="json"),
        "harness_version": HARNESS_VERSION,
        "backend": "transformers",
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "attention": model.model.config._attn_implementation,
        "batch_size": model.batch_size
        if config.precision == Precision.bfloat16
        else None,  # float32 does not depend on it
        "max_length": model.max_length,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
        "multiturn": config.chat_template,
        "bos_count": ids.count(model.tokenizer.bos_token_id),
        "probe": {"first": ids[:PROBE_FIRST], "last": ids[-PROBE_LAST:], "length": len(ids)},
        "truncated_prompts": model.watch.truncated,
        "tasks": {
            name: {
                "version": task.VERSION,
                "num_fewshot": task.get_config("num_fewshot"),
                "output_type": task.get_config("output_type"),
                "generation": task.get_config("generation_kwargs"),
                "filters": [f.name for f in task._filters],
                "items": results["n-samples"][name]["effective"],
            }
            for name, task in tasks.items()
        },
    }


def probe(model: WatchedLM, request: tuple[str, Any]) -> list[int]:
    """Return the ids of one request, by the way on which the harness itself comes to them."""
    prompt, second = request
    if isinstance(second, str):
        prompt_ids, answer_ids = model._encode_pair(prompt, second)
        return [*prompt_ids, *answer_ids]
    ids: list[int] = model.tok_batch_encode([prompt])[0][0].tolist()
    return ids
