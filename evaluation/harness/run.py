"""Run one benchmark with lm-eval's stock tasks, offline, and turn what it returns into rows of our own.

This is the one file that knows lm-eval. Nothing of a task is changed but what the config names (shots, seed, answer cap, item
limit), in the way of `lm_eval.simple_evaluate`, so that the numbers are those of `python -m lm_eval` to the last digit. It is
called below that function, since that one spends seconds on a report of the machine and ends with a result file of its own.

Requests are built once, here, and answered by an engine (evaluation/harness/calls.py): the model in this process, which leaves out what no
number depends on (evaluation/harness/engine.py), copies of it in several (evaluation/harness/workers.py), vLLM, or a server
(evaluation/harness/endpoint.py). What is added stands beside the numbers: the ids that are sent are looked at, each forward pass heeds
the stop request, each finished request is a step of progress and kept in `work` for a second start, and HumanEval's `code_eval`,
which would fetch code from the hub and run model-written programs in this very process, is replaced by the sandbox before the
task is loaded.
"""

import contextlib
import json
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
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

from evaluation.config import HARNESS_VERSION, Backend, BenchmarkConfig
from evaluation.harness.calls import ENDED, Answer, Call, Engine, Score, Writing
from evaluation.harness.calls import Row as EngineRow
from evaluation.harness.endpoint import EndpointEngine, locate
from evaluation.harness.engine import TransformersEngine, load_model
from evaluation.harness.mirror import known_data
from evaluation.harness.offline import closed_sockets
from evaluation.harness.profile import describe, describe_machine
from evaluation.harness.samples import score_rows, write_samples
from evaluation.harness.sandbox import Outcome, SandboxedCodeEval, check_sandbox
from evaluation.harness.stock import find_folders, stock_folder
from evaluation.harness.watch import Watch
from evaluation.harness.workers import Copies, WorkerPool
from evaluation.responses import Responses
from evaluation.suites import default_batch_size, fix_batch_size
from training.config import Runtime
from training.job import METRICS_FILE, Interrupted, write_json
from training.model import DTYPES, LOCAL, check_model_folder, find_context, resolve_device
from training.weights import digest_weights

STOCK_FOLDERS = (
    "mmlu/default",
    "gsm8k",
    "humaneval",
    "bbh",
)  # of the four benchmarks, which need no search; lm-eval's index of all tasks takes ten seconds
HUMANEVAL_MODULE = "lm_eval.tasks.humaneval.utils"
RESPONSES = "responses.jsonl"  # in the work folder
PROBE = "One, two, three"
VLLM_ROWS = 256  # that vLLM is given at once: it batches them, and what it has answered is kept after each
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
    key: str = "",
) -> list[Row]:
    """Return the score rows of one benchmark (docs/architecture.md) and write its samples, profile and metrics.

    Behind an endpoint, `model_folder` has the served model's config and tokenizer, and `key` is the endpoint's. `work` takes the
    harness's copies of the data, and the answers so far: a run that was stopped or killed goes on from them when it is started again
    with the same config and weights. Raises Interrupted within one forward pass of `stop` being set, and ValueError for a config
    that the tasks or the model cannot meet, before any item is answered where that can be known.
    """
    check_request(config, model_folder=model_folder)
    config = fix_batch_size(config, microbatch_tokens=runtime.microbatch_tokens)
    weights = None if config.endpoint else digest_weights(model_folder)
    machine = describe_machine(config, runtime=runtime)
    door = locate(config.endpoint) if config.endpoint else None
    identity = {"config": config.model_dump(mode="json"), "weights": weights, "machine": machine}
    responses = Responses(work / RESPONSES, identity=identity)
    with contextlib.closing(responses), closed_sockets(but=door), offline(work / "datasets"):
        outcomes: dict[tuple[str, str], Outcome] = {}
        tasks = load_tasks(config, mirror=mirror, outcomes=outcomes)
        configure_tasks(tasks, config=config)
        check_tasks(tasks, config=config)
        watch = Watch(output / METRICS_FILE, stop=stop)
        model = load_policy(model_folder, config=config, runtime=runtime, watch=watch, responses=responses, key=key)
        with contextlib.closing(model.engine):
            served = ask_served(model, tasks, config=config)
            results = run_tasks(model, tasks, config=config)
    rows = score_rows(results, config=config, harness_version=HARNESS_VERSION)
    write_samples(
        results["samples"],
        output / "samples.jsonl",
        config=config,
        cut=watch.cut,
        outcomes=outcomes,
        question=lambda name, doc: describe_question(tasks[name], doc),
    )
    policy: Row = {"weights_sha256": weights} | served
    profile = describe(results, config=config, model=model, tasks=tasks, machine=machine, identity=policy)
    write_json(output / "profile.json", profile)
    return rows


def run_tasks(model: "PolicyLM", tasks: dict[str, Any], *, config: BenchmarkConfig) -> Row:
    """Return what lm-eval makes of a model's answers, seeded as its command line is."""
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    set_torch_seed(TORCH_SEED)
    results: Row = run_harness(
        model,
        {"tasks": tasks},
        limit=config.limit,
        system_instruction=config.system_prompt,
        apply_chat_template=config.chat_template,
        fewshot_as_multiturn=config.chat_template,
        confirm_run_unsafe_code=True,  # in the sandbox, that is
    )
    return results


def ask_served(model: "PolicyLM", tasks: dict[str, Any], *, config: BenchmarkConfig) -> Row:
    """Return what a served model says it is, unproven; nothing of one whose weights are known. ValueError where it cannot do the tasks."""
    if config.endpoint is None:
        return {}
    assert isinstance(model.engine, EndpointEngine), f"{config.endpoint.url} is asked by {type(model.engine).__name__}"
    scored = [name for name, task in tasks.items() if task.get_config("output_type") != "generate_until"]
    reported = model.engine.check(model.tok_encode(PROBE), scored=scored)
    return {"unverified": config.endpoint.model_dump() | {"reported": reported}}


def check_request(config: BenchmarkConfig, *, model_folder: Path) -> None:
    """Raise ValueError for what can be refused before weights and data are loaded."""
    check_model_folder(model_folder, weights=config.endpoint is None)
    positions = find_context(transformers.AutoConfig.from_pretrained(model_folder, **LOCAL))
    if positions is not None and positions < config.max_length:
        raise ValueError(
            f"benchmark {config.name}: max_length is {config.max_length}, but the model {model_folder} has {positions} "
            "positions; lower max_length"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder, **LOCAL)
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


def load_tasks(config: BenchmarkConfig, *, mirror: Path, outcomes: dict[tuple[str, str], Outcome]) -> dict[str, Any]:
    """Return lm-eval's task objects by name, groups taken apart, their rows read from the mirror.

    Where they run programs, how each ends goes into `outcomes`, by program and test.
    """
    others = tuple(name for name in config.tasks if not known_data(name))
    folders = [stock_folder() / name for name in STOCK_FOLDERS] if len(others) < len(config.tasks) else []
    folders += [folder for folder in find_folders(others) if folder not in folders]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    with contextlib.chdir(mirror), sandboxed_code_eval(seconds=config.sandbox_seconds, outcomes=outcomes):
        loaded: dict[str, Any] = manager.load(list(config.tasks))["tasks"]
    return loaded


@contextlib.contextmanager
def sandboxed_code_eval(*, seconds: float, outcomes: dict[tuple[str, str], Outcome]) -> Iterator[None]:
    """While tasks are loaded, `evaluate.load("code_eval")` returns the sandboxed one, and nothing else can be loaded.

    lm-eval keeps the modules of its tasks, and HumanEval's takes its metric when it is first loaded; so it is forgotten.
    """
    original = hf_evaluate.load
    sys.modules.pop(HUMANEVAL_MODULE, None)

    def load(name: str, *_: Any, **__: Any) -> SandboxedCodeEval:
        if name != "code_eval":
            raise ValueError(f"metric {name!r}: would be fetched from the hub; take a task whose metrics lm-eval holds")
        return SandboxedCodeEval(seconds=seconds, outcomes=outcomes)

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
        functions = {"pass@1" if metric == "pass_at_k" else metric: metric for metric in task._metric_fn_list}
        metrics = list(functions)
        own = task.get_config("num_fewshot")
        wrong = None
        if config.filter not in filters:
            wrong = f"has no filter {config.filter!r}, expected one of {', '.join(filters)}"
        elif config.metric not in metrics:
            wrong = f"has no metric {config.metric!r}, expected one of {', '.join(metrics)}"
        elif not is_mean(task, functions[config.metric]):
            wrong = f"has a {config.metric} that is no mean over items, expected one of {', '.join(m for m in metrics if is_mean(task, functions[m]))}"
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
    """lm-eval's Transformers backend: its tokenisation, its requests, its post-processing, with an engine between.

    `start` makes the engine of the tokenizer, where the model itself is elsewhere and this one has no weights.
    """

    def __init__(
        self, *, watch: Watch, responses: Responses, start: Callable[[Any], Engine] | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.watch, self.responses = watch, responses
        self.here = start is None
        if start is None:
            self.engine: Engine = TransformersEngine(self.model, self.tokenizer, batch_size=self.batch_size)
            self.model.register_forward_pre_hook(watch.before_forward)
        else:
            self.engine = start(self.tokenizer)
        self._task_of: dict[tuple[str, str], str] = {}
        watch.bos = self.tokenizer.bos_token_id
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
        for index, (_, prompt, continuation) in enumerate(requests):
            same.setdefault((*prompt, *continuation[:-1]), []).append(index)
        members, rows = [], []
        for some in same.values():
            row = self._row(
                [requests[index] for index in some]
            )  # of answered ones too, whose ids are counted and looked at
            left = [index for index in some if not self._take_up(requests[index][0], index, answers)]
            if left:
                members.append(left)
                rows.append(replace(row, endings=tuple(tuple(requests[index][2]) for index in left)))
        for at, scores in self.engine.score(rows):
            for index, score in zip(members[at], scores, strict=True):
                text, answers[index] = requests[index][0], score
                if text:
                    self.responses.add("loglikelihood", text, answers[index])
                self.watch.add_partial("loglikelihood", text, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _take_up(self, text: Any, index: int, answers: dict[int, tuple[float, bool]]) -> bool:
        """Tell whether a request was answered before, and put its answer among the others."""
        known = self.responses.get("loglikelihood", text) if text else None  # windows of a long text have none
        if known:
            answers[index] = (known[0], known[1])
            self.watch.add_partial("loglikelihood", text, known)
        return bool(known)

    def _row(self, requests: Sequence[Any]) -> EngineRow:
        """Return the row of requests whose ids are the same but for the last one."""
        text, prompt, continuation = max(requests, key=lambda request: len(request[2]))
        ids = [*prompt, *continuation]
        room = self.max_length + self.engine.spare
        fits = len(ids) <= room
        self.watch.truncated += 0 if fits else len(requests)
        kept = ids[-room:][:-1]
        self.watch.look(kept)
        endings = tuple(tuple(request[2]) for request in requests)
        return EngineRow(kept, endings, task=self._task_of.get(text) if fits else None)

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
            if not self.here:
                raise ValueError(
                    f"task {requests[0].task_name}: asks for {settings}, expected greedy search; sampling and beams are stock's, in one "
                    "process; set runtime.workers to 1 and the backend to transformers"
                )
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
        for at, answer in self.engine.write(rows, limit=limit, stops=stops):
            request = requests[waiting[at]]
            text = postprocess_generated_text(answer.text, stop=stops, think_end_token=None)
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


class VllmEngine(Engine):
    """lm-eval's vLLM backend for rows of ids: vLLM makes its own batches and keeps its own prefixes."""

    batch_size = VLLM_ROWS
    spare = -1  # it writes a token after what it scores

    def __init__(self, folder: Path, *, config: BenchmarkConfig, runtime: Runtime, stop: threading.Event) -> None:
        import vllm  # which describe_machine found
        from lm_eval.models.vllm_causallms import VLLM

        self._sampling, self._stop = vllm.SamplingParams, stop
        self._lm = VLLM(
            pretrained=str(folder),
            dtype=config.precision.value,
            max_model_len=config.max_length,
            tensor_parallel_size=runtime.workers,
        )

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield (number, answers) of every call, one after the other."""
        for number, call in enumerate(calls):
            if self._stop.is_set():
                raise Interrupted("benchmark")
            yield number, self._score(call.rows) if call.writing is None else self._write(call.rows, call.writing)

    def _score(self, rows: Sequence[EngineRow]) -> list[list[Score]]:
        endings = [ending for row in rows for ending in row.endings]
        asked = [[*row.ids, ending[-1]] for row in rows for ending in row.endings]
        outputs = self._lm._model_generate(requests=asked, generate=False)
        scores = (
            self._lm._parse_logprobs(tokens=ids, outputs=output, ctxlen=len(ids) - len(ending))
            for ids, ending, output in zip(asked, endings, outputs, strict=True)
        )
        return [[next(scores) for _ in row.endings] for row in rows]

    def _write(self, rows: Sequence[EngineRow], writing: Writing) -> list[Answer]:
        how = self._sampling(temperature=0.0, max_tokens=writing.limit, stop=list(writing.stops))
        asked = [row.ids for row in rows]
        outputs = self._lm._model_generate(requests=asked, generate=True, sampling_params=how)
        written = [out.outputs[0] for out in outputs]
        broken = sorted({str(each.finish_reason) for each in written} - set(ENDED))
        if broken:
            raise RuntimeError(
                f"vllm: broke off answers ({', '.join(broken)}), expected {' or '.join(ENDED)}; run the same command again to go on"
            )
        return [Answer(each.text, each.finish_reason != "length") for each in written]


def load_policy(
    folder: Path, *, config: BenchmarkConfig, runtime: Runtime, watch: Watch, responses: Responses, key: str = ""
) -> PolicyLM:
    """Return the policy behind lm-eval's interface: safetensors, local files, a fixed batch size, one device or one a worker."""
    batch_size = config.batch_size or default_batch_size(runtime.microbatch_tokens)
    start = choose_start(folder, config=config, runtime=runtime, batch_size=batch_size, stop=watch.stop, key=key)
    return PolicyLM(
        watch=watch,
        responses=responses,
        start=start,
        pretrained=build_hollow(folder, dtype=DTYPES[config.precision])
        if start
        else load_model(folder, precision=config.precision, device=resolve_device(runtime.device)),
        tokenizer=str(folder),
        backend="causal",
        batch_size=batch_size,
        max_length=config.max_length,
    )


def choose_start(
    folder: Path, *, config: BenchmarkConfig, runtime: Runtime, batch_size: int, stop: threading.Event, key: str
) -> Callable[[Any], Engine] | None:
    """Return what starts the engine, given the tokenizer; None where the model is in this process."""
    if config.endpoint is not None:
        endpoint = config.endpoint
        return lambda _: EndpointEngine(endpoint, key=key, concurrency=runtime.workers, stop=stop)
    if config.backend == Backend.vllm:
        return lambda _: VllmEngine(folder, config=config, runtime=runtime, stop=stop)
    if runtime.workers == 1:
        return None
    copies = partial(
        Copies,
        folder=folder,
        precision=config.precision,
        device=runtime.device,
        batch_size=batch_size,
        workers=runtime.workers,
        threads=runtime.threads or torch.get_num_threads(),
    )
    return lambda tokenizer: WorkerPool(copies(tokenizer=tokenizer), stop=stop)


def build_hollow(folder: Path, *, dtype: torch.dtype) -> Any:
    """Return the model of a folder's config without weights, which tells what it is and computes nothing."""
    config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (folder / transformers.utils.GENERATION_CONFIG_NAME).is_file():  # the copies have it, and the profile tells it
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model
