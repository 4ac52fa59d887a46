"""Run one benchmark with lm-eval's stock tasks, offline, and turn what it returns into rows of our own.

This is the one file that knows lm-eval. Nothing of a task is changed but what the config names (shots, seed, answer cap, item
limit), in the way of `lm_eval.simple_evaluate`, so that the numbers are those of `python -m lm_eval` to the last digit. It is
called below that function, since that one spends seconds on a report of the machine and ends with a result file of its own.

Requests are answered by the engine (evaluation/engine.py), which leaves out what no number depends on. What is added stands beside
the numbers: the ids that are sent are looked at, each forward pass heeds the stop request, each finished request is a step of
progress and kept in `work` for a second start, and HumanEval's `code_eval`, which would fetch code from the hub and run
model-written programs in this very process, is replaced by the sandbox before the task is loaded.
"""

import contextlib
import json
import random
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate as hf_evaluate
import huggingface_hub.constants
import lm_eval.tasks
import numpy as np
import torch
import transformers
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import set_torch_seed

from evaluation.config import HARNESS_VERSION, BenchmarkConfig
from evaluation.engine import Engine
from evaluation.engine import Row as EngineRow
from evaluation.mirror import known_data
from evaluation.offline import closed_sockets
from evaluation.profile import describe
from evaluation.responses import Responses
from evaluation.samples import score_rows, write_samples
from evaluation.sandbox import SandboxedCodeEval, check_sandbox
from evaluation.stock import find_folders, stock_folder
from evaluation.watch import Watch
from training.config import Runtime
from training.job import write_json
from training.model import check_model_folder, digest_weights, resolve_device

STOCK_FOLDERS = (
    "mmlu/default",
    "gsm8k",
    "humaneval",
    "bbh",
)  # of the four benchmarks, which need no search; lm-eval's index of all tasks takes ten seconds
HUMANEVAL_MODULE = "lm_eval.tasks.humaneval.utils"
TYPICAL_PROMPT_TOKENS = 256  # the default budget of 2,048 tokens makes batches of 8
POSITIONS = "max_position_embeddings"
RESPONSES = "responses.jsonl"  # in the work folder
GREEDY = {"do_sample": False, "temperature": 0.0}
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

    `work` takes the harness's copies of the data, and the answers so far: a run that was stopped or killed goes on from them when it
    is started again with the same config and weights. Raises Interrupted within one forward pass of `stop` being set, and
    ValueError for a config that the tasks or the model cannot meet, before any item is answered where that can be known.
    """
    check_request(config, model_folder=model_folder)
    weights = digest_weights(model_folder)
    identity = {"config": config.model_dump(mode="json"), "weights": weights}
    responses = Responses(work / RESPONSES, identity=identity)
    with contextlib.closing(responses), closed_sockets(), offline(work / "datasets"):
        tasks = load_tasks(config, mirror=mirror)
        configure_tasks(tasks, config=config)
        check_tasks(tasks, config=config)
        watch = Watch(output / "metrics.jsonl", stop=stop)
        model = load_model(model_folder, config=config, runtime=runtime, watch=watch, responses=responses)
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
    write_samples(
        results["samples"],
        output / "samples.jsonl",
        config=config,
        cut=watch.cut,
        question=lambda name, doc: describe_question(tasks[name], doc),
    )
    profile = describe(results, config=config, model=model, tasks=tasks, weights_sha256=weights)
    write_json(output / "profile.json", profile)
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
    others = tuple(name for name in config.tasks if not known_data(name))
    folders = [stock_folder() / name for name in STOCK_FOLDERS] if len(others) < len(config.tasks) else []
    folders += [folder for folder in find_folders(others) if folder not in folders]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
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
    """Raise ValueError when a task lacks the filter, the metric, the shots or the items that the config names."""
    most = max(len(task.eval_docs) for task in tasks.values())
    if config.limit is not None and config.limit > most:
        raise ValueError(
            f"benchmark {config.name}: the item limit is {config.limit}, but its largest task has {most} items; lower the limit, "
            "or leave it out for all items"
        )
    for name, task in tasks.items():
        filters = [f.name for f in task._filters]
        metrics = list(task._metric_fn_list)
        own = task.get_config("num_fewshot")
        wrong = None
        if config.filter not in filters:
            wrong = f"has no filter {config.filter!r}, expected one of {', '.join(filters)}"
        elif config.metric not in metrics and "pass_at_k" not in metrics:  # whose names it gives with its values
            wrong = f"has no metric {config.metric!r}, expected one of {', '.join(metrics)}"
        elif not is_mean(task, config.metric if config.metric in metrics else "pass_at_k"):
            wrong = f"has a {config.metric} that is no mean over items, expected one of {', '.join(m for m in metrics if is_mean(task, m))}"
        elif config.num_fewshot is not None and own != config.num_fewshot:
            wrong = f"takes {own} shots and no other number, got {config.num_fewshot}"
        elif task.get_config("output_type") == "generate_until" and answer_cap(task) >= config.max_length:
            wrong = f"generates {answer_cap(task)} tokens, which at max_length {config.max_length} leaves no room for a prompt"
        if wrong:
            raise ValueError(f"benchmark {config.name}: the task {name} {wrong}; correct the benchmark's settings")


def is_mean(task: Any, metric: str) -> bool:
    """Tell whether a metric has a score for each item and their mean as the task's: what pooling, pairing and the gate take."""
    return getattr(task.aggregation()[metric], "__name__", "") == "mean"


def describe_question(task: Any, doc: Row) -> str:
    """Return what an item asks, without worked examples and answer: the field that its task names for this, or its text.

    lm-eval's own `doc_to_decontamination_query` fails on the templates that most tasks have there.
    """
    field = task.get_config("doc_to_decontamination_query")
    if isinstance(field, str) and field in doc:
        return str(doc[field])
    text = task.doc_to_text(doc)
    return (
        text if isinstance(text, str) else " ".join(task.doc_to_choice(doc))
    )  # where the prompts are what is chosen from


def answer_cap(task: Any) -> int:
    """Return the most tokens that a generating task may answer with."""
    return int(task.get_config("generation_kwargs").get("max_gen_toks", DEFAULT_MAX_GEN_TOKS))


class PolicyLM(HFLM):
    """lm-eval's Transformers backend: its tokenisation, its requests, its post-processing, with the engine between."""

    def __init__(self, *, watch: Watch, responses: Responses, **settings: Any) -> None:
        super().__init__(**settings)
        self.watch, self.responses = watch, responses
        self.engine = Engine(self.model, batch_size=self.batch_size, pad_id=self.tokenizer.pad_token_id)
        self._task_of: dict[tuple[str, str], str] = {}
        watch.bos = self.tokenizer.bos_token_id
        self.model.register_forward_pre_hook(watch.before_forward)
        self.set_cache_hook(watch)

    def loglikelihood(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, whether greedy search would say it) of each request's continuation."""
        self._task_of = {request.args: request.task_name for request in requests}
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        self.watch.expect(len(requests))
        answers: dict[int, tuple[float, bool]] = {}
        same: dict[tuple[int, ...], list[int]] = {}  # requests whose logits are those of one row
        for index, (text, prompt, continuation) in enumerate(requests):
            if text and (known := self.responses.get("loglikelihood", text)):  # windows of a long text have none
                answers[index] = (known[0], known[1])
                self.watch.add_partial("loglikelihood", text, known)
            else:
                same.setdefault((*prompt, *continuation[:-1]), []).append(index)
        members = list(same.values())
        rows = [self._row([requests[index] for index in some]) for some in members]
        for at, logits_KV in self.engine.read(rows):
            logp_KV = torch.log_softmax(logits_KV, dim=-1, dtype=self.softmax_dtype)
            for index in members[at]:
                text, _, continuation = requests[index]
                answers[index] = score_continuation(logp_KV, continuation)
                if text:
                    self.responses.add("loglikelihood", text, answers[index])
                self.watch.add_partial("loglikelihood", text, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _row(self, requests: Sequence[Any]) -> EngineRow:
        """Return the row of requests whose ids are the same but for the last one."""
        text, prompt, continuation = max(requests, key=lambda request: len(request[2]))
        ids = [*prompt, *continuation]
        fits = len(ids) <= self.max_length + 1
        self.watch.truncated += 0 if fits else len(requests)
        kept = ids[-(self.max_length + 1) :][:-1]
        self.watch.look(kept)
        return EngineRow(kept, tail=len(continuation), task=self._task_of.get(text) if fits else None)

    def generate_until(self, requests: Any, **_: Any) -> list[str]:
        """Return each request's answer, cut at its first stop string."""
        self.watch.expect(len(requests))
        answers: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for members in alike.values():
            texts = self._generate_alike([requests[index] for index in members])
            answers |= dict(zip(members, texts, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _generate_alike(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests of the same generation settings."""
        settings = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        stops = handle_stop_sequences(
            settings.pop("until", None), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        limit = settings.pop("max_gen_toks")
        prompts = [self._prompt_ids(request.args[0], room=self.max_length - limit) for request in requests]
        if any(item not in GREEDY.items() for item in settings.items()):
            texts: list[str] = super().generate_until(requests, disable_tqdm=True)  # sampling and beams are stock's
            return texts
        answers: dict[int, str] = {}
        waiting = []
        for index, request in enumerate(requests):
            known = self.responses.get("generate_until", request.args)
            if known is None:
                waiting.append(index)
            else:
                answers[index] = self._finish(request, text=known["text"], cut=known["cut"])
        rows = [
            EngineRow(prompts[index][0], task=requests[index].task_name if prompts[index][1] else None)
            for index in waiting
        ]
        for at, answer in self.engine.write(rows, limit=limit, tokenizer=self.tokenizer, stops=stops):
            request = requests[waiting[at]]
            text = postprocess_generated_text(self.tok_decode(answer.ids), stop=stops, think_end_token=None)
            self.responses.add("generate_until", request.args, {"text": text, "cut": not answer.stopped})
            answers[waiting[at]] = self._finish(request, text=text, cut=not answer.stopped)
        return [answers[index] for index in range(len(requests))]

    def _prompt_ids(self, prompt: str, *, room: int) -> tuple[list[int], bool]:
        """Return a prompt's ids, cut from the left where they have no room, and whether they had."""
        ids = self.tok_batch_encode([prompt])[0][0].tolist() or [self.prefix_token_id]
        fits = len(ids) <= room
        self.watch.truncated += not fits
        self.watch.look(ids[-room:])
        return ids[-room:], fits

    def _finish(self, request: Any, *, text: str, cut: bool) -> str:
        if cut:
            self.watch.cut.add(request.args[0])
        self.watch.add_partial("generate_until", request.args, text)
        return text


def score_continuation(logp_KV: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Return (summed log-probability in nats, whether each token is the likeliest) of ids under the last rows of logp_KV."""
    target_K = torch.tensor(continuation, device=logp_KV.device)
    last_KV = logp_KV[-len(continuation) :]
    logp = float(last_KV.gather(1, target_K[:, None]).squeeze(1).sum())
    return logp, bool((last_KV.argmax(dim=-1) == target_K).all())


def load_model(
    folder: Path, *, config: BenchmarkConfig, runtime: Runtime, watch: Watch, responses: Responses
) -> PolicyLM:
    """Return the policy behind lm-eval's interface: safetensors, local files, one device, a fixed batch size."""
    return PolicyLM(
        watch=watch,
        responses=responses,
        pretrained=str(folder),
        backend="causal",
        device=resolve_device(runtime.device).type,  # left to itself it asks for a GPU
        dtype=config.precision.value,
        batch_size=config.batch_size or max(1, runtime.microbatch_tokens // TYPICAL_PROMPT_TOKENS),
        max_length=config.max_length,
        use_safetensors=True,
        local_files_only=True,
    )
