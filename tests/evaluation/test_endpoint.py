"""The backend `openai` against a real HTTP server with a real model: the numbers of this process, and every way to fail."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evaluation.config import Backend, BenchmarkConfig, Endpoint, SuiteConfig
from evaluation.gate.policy import check_proven
from evaluation.harness.benchmark import summarise
from evaluation.harness.endpoint import EndpointFailed, locate
from evaluation.harness.result import pair_items, read_result
from evaluation.suites import find_profile, hha, paper, place_suite, reward_bias
from infra.settings import child_environment
from tasks.child import ChildJob, UserError, run_child
from tests.evaluation.completions_server import CompletionsServer
from tests.evaluation.evaluated import GSM8K, MMLU, read_answers, run
from training.config import Device, Runtime

NAME = "tiny-llama"
KEY = "sk-not-to-be-seen-anywhere"
RUNTIME = Runtime(device=Device.cpu, threads=1, workers=3)
ask = partial(run, runtime=RUNTIME)
CHAT = MMLU.model_copy(update={"chat_template": True, "num_fewshot": 2, "system_prompt": "Be brief."})
HUMANEVAL = BenchmarkConfig(
    name="humaneval_part", tasks=("humaneval",), metric="pass@1", filter="create_test", max_gen_toks=6, max_length=1024
)


@pytest.fixture
def server(tiny_policy: Path) -> Iterator[CompletionsServer]:
    with CompletionsServer(tiny_policy, name=NAME) as running:
        yield running
        running.shutdown()


@pytest.fixture
def card(tiny_policy: Path, tmp_path: Path) -> Path:
    """Return what is known here of the served model: its config and tokenizer, no weights."""
    folder = tmp_path / "card"
    folder.mkdir()
    for path in tiny_policy.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def behind(config: BenchmarkConfig, server: CompletionsServer, **endpoint: str) -> BenchmarkConfig:
    where = Endpoint(**({"url": server.url, "model": NAME} | endpoint))
    return config.model_copy(update={"backend": Backend.openai, "endpoint": where})


@pytest.mark.parametrize("config", [MMLU, CHAT, GSM8K, HUMANEVAL], ids=["choices", "chat", "generation", "programs"])
def test_an_endpoint_gives_the_numbers_of_this_process(
    tiny_policy: Path, card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer, config: BenchmarkConfig
) -> None:
    server.patience = 1.0  # answers so short are else over before the next question comes
    here = run(tiny_policy, mirror, config, folder=tmp_path / "here")
    there = ask(card, mirror, behind(config, server), folder=tmp_path / "there")
    assert there.samples == here.samples and there.rows == here.rows
    assert there.answers.keys() == here.answers.keys()
    for request, answer in here.answers.items():
        if isinstance(answer, dict):
            assert there.answers[request] == answer
        else:
            assert there.answers[request] == [pytest.approx(answer[0], abs=1e-4), answer[1]]
    assert 1 < server.most_under_way <= RUNTIME.workers
    same = ("prompts_sha256", "data_sha256", "tokenizer_sha256", "template_sha256", "bos", "probe", "tasks")
    assert {name: there.profile[name] for name in same} == {name: here.profile[name] for name in same}


def test_what_is_served_is_told_and_not_proven(
    card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer
) -> None:
    profile = ask(card, mirror, behind(GSM8K, server, revision="step 40"), folder=tmp_path / "a").profile
    assert (profile["backend"], profile["dtype"], profile["attention"]) == ("openai", None, None)
    named = {"url": server.url, "model": NAME, "revision": "step 40", "reported": f"{NAME}-0711"}
    assert profile["model"] == {"weights_sha256": None, "unverified": named}
    ask(card, mirror, behind(GSM8K, server, revision="step 50"), folder=tmp_path / "b")
    ours, theirs = (read_result(tmp_path / name / "output") for name in ("a", "b"))
    assert len(pair_items(ours, theirs)[0]) == 6, "served models are comparable with each other"


def test_no_gate_decides_on_a_served_model(card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer) -> None:
    from evaluation.config import GatePolicy
    from evaluation.gate.decide import Evidence, decide

    ask(card, mirror, behind(GSM8K, server), folder=tmp_path)
    evidence = Evidence(results=[read_result(tmp_path / "output")])
    policy = GatePolicy(margins={"gsm8k_part": 0.1}, targets={"gsm8k_part": 0.0})
    with pytest.raises(
        ValueError, match=r"gate: the scores of gsm8k_part are of a model behind an endpoint, and nothing"
    ):
        decide(policy, challenger=evidence, champion=evidence, same_model=False)
    with pytest.raises(
        ValueError, match=r"gate: gsm8k_part would be of the model behind an endpoint, not of the challenger"
    ):
        check_proven(SuiteConfig(benchmarks=(behind(GSM8K, server),)))


@pytest.mark.parametrize("config", [MMLU, GSM8K], ids=["choices", "generation"])
def test_an_endpoint_that_dies_midway_is_told_and_what_it_answered_is_kept(
    card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer, config: BenchmarkConfig
) -> None:
    whole = ask(card, mirror, behind(config, server), folder=tmp_path / "whole")
    needed = len(server.completions)
    server.completions.clear()
    server.lives = needed // 2
    with pytest.raises(
        EndpointFailed, match=r"POST /completions was asked 5 times without an answer.* to go on from the"
    ):
        ask(card, mirror, behind(config, server), folder=tmp_path / "cut")
    kept = read_answers(tmp_path / "cut")
    assert 0 < len(kept) < len(whole.answers)
    for thread in threading.enumerate():  # requests that were under way end by themselves
        if thread.name.startswith("endpoint"):
            thread.join()
    server.revive(needed)
    before = len(server.completions)
    rest = ask(card, mirror, behind(config, server), folder=tmp_path / "cut")
    assert rest.samples == whole.samples and rest.rows == whole.rows
    assert read_answers(tmp_path / "cut")[: len(kept)] == kept
    assert len(server.completions) - before == needed - len(kept), "nothing is asked twice"


def test_an_endpoint_without_log_probabilities_names_the_tasks(
    card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer
) -> None:
    server.echoes = False
    with pytest.raises(
        ValueError, match=r"gave 1 log-probabilities for a prompt of .*mmlu_anatomy, mmlu_virology need"
    ):
        ask(card, mirror, behind(MMLU, server), folder=tmp_path / "a")
    assert ask(card, mirror, behind(GSM8K, server), folder=tmp_path / "b").rows


def test_a_busy_endpoint_is_asked_again(card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer) -> None:
    server.busy = 2
    assert ask(card, mirror, behind(GSM8K, server), folder=tmp_path).rows


def test_an_endpoint_that_writes_nothing_is_flagged(
    card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer
) -> None:
    server.silent = True
    rows = ask(card, mirror, behind(GSM8K, server), folder=tmp_path).rows
    flag = summarise(rows, output=tmp_path / "output", name="gsm8k_part")["flag"]
    assert flag.startswith("zero: none of 6 answers is right; empty: 100% of the answers have no text")


@pytest.mark.parametrize("reason", ["abort", "content_filter"])
def test_an_answer_that_was_broken_off_is_neither_kept_nor_scored(
    card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer, reason: str
) -> None:
    server.ends_by = reason
    with pytest.raises(
        EndpointFailed, match=rf"broke off an answer of gsm8k: finish_reason '{reason}'.*stop or length"
    ):
        run(card, mirror, behind(GSM8K, server), folder=tmp_path)
    assert read_answers(tmp_path) == []
    server.ends_by = ""
    for thread in threading.enumerate():
        if thread.name.startswith("endpoint"):
            thread.join()
    assert run(card, mirror, behind(GSM8K, server), folder=tmp_path).rows


def test_a_name_that_is_not_served_is_refused_with_near_ones(
    card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer
) -> None:
    with pytest.raises(ValueError, match=rf"serves no model 'tiny-lama'; expected one of its 1, nearest: {NAME}"):
        ask(card, mirror, behind(GSM8K, server, model="tiny-lama"), folder=tmp_path)


def test_a_key_is_asked_for_and_never_repeated(
    card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer
) -> None:
    server.key = "another"
    with pytest.raises(ValueError, match=r"status 401.*\[key\].*; set VARFLOW_ENDPOINT_KEY") as told:
        ask(card, mirror, behind(GSM8K, server), folder=tmp_path, key=KEY)
    assert KEY not in str(told.value)


def test_an_endpoint_that_is_not_there_is_named(
    card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(EndpointFailed, match=rf"endpoint http://127.0.0.1:{port}/v1: GET /models .* ConnectError"):
        ask(card, mirror, behind(GSM8K, server, url=f"http://127.0.0.1:{port}/v1"), folder=tmp_path)


def test_the_key_reaches_the_child_and_no_file(
    card: Path, mirror: Path, tmp_path: Path, server: CompletionsServer
) -> None:
    server.key = KEY
    job = ChildJob(
        package="evaluation",
        name="benchmark",
        config=behind(GSM8K, server).model_dump(mode="json"),
        runtime=RUNTIME.model_dump(mode="json"),
        inputs={"model": card, "mirror": mirror},
        folder=tmp_path / "attempt",
        environment=child_environment({"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}),
        stdin=f"{KEY}\n",
    )
    job.folder.mkdir()
    seen: list[bytes] = []

    def look(_: Any) -> None:
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # one that has ended
                if (entry / "cwd").resolve() == job.folder.resolve():
                    seen.append((entry / "environ").read_bytes() + (entry / "cmdline").read_bytes())

    run_child(job, on_metrics=look)
    assert len(read_result(job.output).items) == 6
    texts = [path.read_bytes() for path in job.folder.rglob("*") if path.is_file()]
    assert seen and not any(KEY.encode() in text for text in [*seen, *texts])
    assert KEY not in repr(job)
    server.key = "another"
    server_said = "status 401"
    (job.output / "scores.json").unlink()
    (job.work / "responses.jsonl").unlink()
    with pytest.raises(UserError, match=server_said):
        run_child(job, on_metrics=lambda _: None)
    assert not any(KEY.encode() in path.read_bytes() for path in job.folder.rglob("*") if path.is_file())


def test_an_endpoint_and_its_backend_come_together() -> None:
    for change in ({"backend": "openai"}, {"endpoint": {"url": "http://a/v1", "model": "m"}}):
        with pytest.raises(ValidationError, match="expected an endpoint for openai and none for the others"):
            BenchmarkConfig.model_validate(MMLU.model_dump() | change)
    for url in ("ftp://a/v1", "http://user:pass@a/v1", "http://a/v1?key=1"):
        with pytest.raises(ValidationError, match="url"):
            Endpoint(url=url, model="m")
    assert locate(Endpoint(url="https://a.example/v1", model="m")) == ("a.example", 443)
    assert locate(Endpoint(url="http://127.0.0.1:8000/v1", model="m")) == ("127.0.0.1", 8000)


def test_a_profile_on_another_backend_is_no_profile() -> None:
    served = place_suite(paper(), backend=None, endpoint="org/llama@8b@http://127.0.0.1:8000/v1")
    assert {b.endpoint for b in served.benchmarks} == {Endpoint(url="http://127.0.0.1:8000/v1", model="org/llama@8b")}
    fast = place_suite(paper(), backend="vllm", endpoint=None)
    assert {b.backend for b in fast.benchmarks} == {Backend.vllm}
    assert find_profile(served) is None and find_profile(fast) is None
    assert (
        place_suite(paper(), backend=None, endpoint=None)
        == paper()
        == place_suite(paper(), backend="transformers", endpoint=None)
    )
    with pytest.raises(ValueError, match=r"backend 'vlm': no such backend; expected one of transformers, vllm, openai"):
        place_suite(paper(), backend="vlm", endpoint=None)
    with pytest.raises(ValueError, match=r"expected NAME@URL"):
        place_suite(paper(), backend=None, endpoint="http://127.0.0.1:8000/v1")


def test_a_suite_on_a_backend_keeps_what_a_reward_model_is_asked() -> None:
    for suite in (hha(), reward_bias()):
        assert place_suite(suite, backend="transformers", endpoint=None) == suite
        with pytest.raises(ValueError, match=r"backend 'vllm': the suite has no benchmarks that it could answer"):
            place_suite(suite, backend="vllm", endpoint=None)
    both = paper().model_copy(update={"alignment": hha().alignment})
    assert place_suite(both, backend="vllm", endpoint=None).alignment == both.alignment


def test_vllm_that_is_not_installed_is_named(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    config = MMLU.model_copy(update={"backend": Backend.vllm})
    with pytest.raises(ValueError, match=r"the backend vllm needs the package vllm, which is not installed here"):
        run(tiny_policy, mirror, config, folder=tmp_path)
    assert list((tmp_path / "output").iterdir()) == [], "nothing was begun"
