"""Judging against a real chat server: both orders, each call once, patience, budget, refusals, and what survives an end."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.harness.result import read_result
from evaluation.judges.config import JudgeConfig, JudgeRuntime
from evaluation.judges.judging import pair_heldout, run
from evaluation.judges.prompt import PAIRWISE
from tasks.child import hand_over
from tasks.judge import describe
from tests.evaluation.chat_server import (
    ChatServer,
    Hang,
    Messages,
    Refuse,
    Rule,
    StandardInput,
    answers_of,
    prefer_first,
    prefer_longer,
)
from training.job import Interrupted, Job

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret-0123456789"
JUDGE = {"kind": "endpoint", "model": "judge", "revision": "2026"}
QUICK = {"patience_seconds": 1.0, "concurrency": 4}
JobMaker = Callable[..., Job]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Rule], ChatServer]]:
    """Start chat servers, the newest one being the judge's endpoint."""
    servers = []

    def start(rule: Rule) -> ChatServer:
        servers.append(ChatServer(rule).__enter__())
        monkeypatch.setattr("sys.stdin", StandardInput(key=KEY, url=servers[-1].url))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def make_job(tmp_path: Path) -> JobMaker:
    """Return a function that makes a job on an EvalBiasBench of `items` pairs, whose better answer is the longer one in all but the last."""

    def make(*, items: int = 4, runtime: dict[str, Any] | None = None, folder: str = "job", **changes: Any) -> Job:
        data = tmp_path / "bias"
        data.mkdir(exist_ok=True)
        rows = [
            {
                "bias": "length bias" if n % 2 else "concreteness",
                "instruction": f"Question {n}?",
                "response1": f"long answer number {n} " + "x" * n,
                "response2": f"short {n}",
                "label": 1 if n < items - 1 else 2,
            }
            for n in range(items)
        ]
        groups: dict[str, Any] = {}
        for row in rows:
            groups.setdefault(row["bias"], []).append(row)
        (data / "biasbench.json").write_text(json.dumps(groups))
        config = JudgeConfig.model_validate({"benchmark": "evalbiasbench", "judge": JUDGE} | changes)
        path = tmp_path / folder / "job.json"
        path.parent.mkdir(exist_ok=True)
        job = {
            "job": "judge", "config": config.model_dump(mode="json"), "inputs": {"benchmark": str(data)},
            "runtime": JudgeRuntime.model_validate(QUICK | (runtime or {})).model_dump(mode="json"),
            "output": str(path.parent / "output"), "work": str(path.parent / "work"),
        }  # fmt: skip
        path.write_text(json.dumps(job))
        return Job.read(path)

    return make


def summary_of(job: Job) -> dict[str, Any]:
    return dict(json.loads((job.output / "summary.json").read_text()))


def count_kept(job: Job) -> int:
    """Return the answers in the file of calls, whose first line names the judge."""
    path = job.output / "calls.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def test_a_judge_that_follows_length_is_right_where_length_is(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    server, job = serve(prefer_longer), make_job(items=4)
    run(job)
    found = summary_of(job)
    assert (found["value"], found["items"], found["judge"], found["served_as"]) == (0.75, 4, "judge@2026", "judge-2026")
    assert (found["accuracy_length bias"], found["accuracy_concreteness"]) == (0.5, 1.0)
    assert (found["position_bias"], found["order_agreement"], found["longer_wins"]) == (0.0, 1.0, 1.0)
    assert (found["calls"], found["tokens"], found["unparseable_pairs"]) == (8, 880, 0)
    assert len(server.answered) == 8 and server.asked[0]["temperature"] == 0 and server.asked[0]["model"] == "judge"
    shown = sorted(answers_of(messages) for messages in server.answered)
    assert shown == sorted([*shown[:4], *((b, a) for a, b in shown[:4])]), "each pair in both orders"
    result = read_result(job.output)
    assert result.score == 0.75 and {row.filter for row in result.scores} == {"judge judge@2026"}


def test_a_judge_that_follows_the_place_is_at_one_half_and_flagged(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    serve(prefer_first)
    job = make_job(items=4)
    run(job)
    found = summary_of(job)
    assert (found["value"], found["position_bias"], found["prefers_first"], found["order_agreement"]) == (
        0.5,
        1.0,
        1.0,
        0.0,
    )
    assert found["consistent_accuracy"] == 0.0
    assert (
        "position: in 100% of the pairs the verdict follows the place" in found["flag"]
        and "chance: 0.5000" in found["flag"]
    )


def test_the_key_goes_to_the_endpoint_and_nowhere_else(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, job = serve(prefer_longer), make_job()
    caplog.set_level("DEBUG")
    run(job)
    assert server.authorizations == {f"Bearer {KEY}"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert KEY not in caplog.text


def test_a_wrong_key_is_said_at_once_and_not_repeated(serve: Callable[[Rule], ChatServer], make_job: JobMaker) -> None:
    server = serve(lambda _: Refuse(401, f"Incorrect API key provided: {KEY}" + "." * 237 + KEY))  # cut within the key
    with pytest.raises(
        Exception, match=r"refuses: status 401: Incorrect API key provided: \[key\]\..*; check VARFLOW_J"
    ) as refusal:
        run(make_job(runtime={"concurrency": 1}))
    assert KEY[:6] not in str(refusal.value) and len(server.asked) == 1


def test_an_answer_out_of_format_is_asked_again_and_then_counted(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    def mumble(messages: Messages) -> str:
        if "Question 0?" in messages[1]["content"]:
            return "I like both of them."
        if "Question 1?" in messages[1]["content"] and len(messages) == 2:
            return "A is better."
        return prefer_longer(messages)

    server, job = serve(mumble), make_job(items=4, format_retries=2)
    run(job)
    found = summary_of(job)
    assert (found["items"], found["unparseable_pairs"], found["unparseable_judgements"]) == (3, 1, 2)
    assert found["value"] == pytest.approx(2 / 3), "what has no verdict is no tie"
    assert found["asked_again"] == 4 and len(server.answered) == 8 + 2 * 2 + 2
    assert found["flag"].startswith("verdicts: 1 of 4 pairs have none in some order and are left out")
    assert found["flag_sample_1"] == "no verdict: 'I like both of them.'"
    again = next(messages for messages in server.answered if len(messages) == 4)
    assert "[[A>B]], [[A=B]], [[B>A]]" in again[3]["content"]


def completion(text: str, *, finish: str = "stop", model: str = "judge") -> bytes:
    """Return a chat completion as an endpoint sends it."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return json.dumps({"model": model, "choices": [choice], "usage": {}}).encode()


def test_a_label_in_reasons_that_the_cap_cut_is_no_verdict_and_is_asked_for_again(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    def ramble(messages: Messages) -> str | bytes:
        """Name the shorter answer on the way, and the longer one in the end."""
        if len(messages) > 2:
            return prefer_longer(messages)
        first, second = map(len, answers_of(messages))
        return completion(f"At first sight [[{'A>B' if first < second else 'B>A'}]], but then", finish="length")

    server, job = serve(ramble), make_job(items=4)
    run(job)
    found = summary_of(job)
    assert (found["value"], found["cut_replies"], found["asked_again"]) == (0.75, 8, 8)
    assert len(server.answered) == 16
    serve(ramble)
    with pytest.raises(ValueError, match=r"none of 4 pairs has a verdict.*a larger max_answer_tokens"):
        run(make_job(items=4, format_retries=0, folder="once"))


@pytest.mark.parametrize(
    ("names", "flag"),
    [
        (("judge",), None),
        (("judge-2026",), None),
        (("2026",), None),
        (("judge-mini",), "judge: judge-mini answered, by its own word, asked was judge, revision 2026"),
        (("judge", "judge-mini"), "judge: 2 models answered under its name: judge, judge-mini"),
    ],
)
def test_another_model_that_answers_under_the_judges_name_is_flagged(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker, names: tuple[str, ...], flag: str | None
) -> None:
    drawn = itertools.cycle(names)
    serve(lambda messages: completion(prefer_longer(messages), model=next(drawn)))
    job = make_job(items=20, runtime={"concurrency": 1})
    run(job)
    found = summary_of(job)
    assert (found["served_as"], found["flag"]) == (", ".join(names), flag)


def test_a_limit_beyond_the_data_is_refused_before_anybody_is_asked(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    server = serve(prefer_longer)
    with pytest.raises(ValueError, match=r"evalbiasbench: items of a group: got the limit 3, there are 2; lower it"):
        run(make_job(items=4, limit=3))
    assert not server.asked


def test_a_judge_that_never_gives_a_verdict_is_no_score(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    serve(lambda _: "")
    with pytest.raises(ValueError, match=r"none of 4 pairs has a verdict in both orders; it answered '';"):
        run(make_job(format_retries=0))


def test_a_busy_server_is_waited_for_as_it_asks(serve: Callable[[Rule], ChatServer], make_job: JobMaker) -> None:
    refusals = iter(
        [Refuse(429, headers={"Retry-After": "0.2"}), Refuse(500), Refuse(503, headers={"Retry-After": "0"})]
    )

    def busy(messages: Messages) -> str | Refuse:
        return next(refusals, None) or prefer_longer(messages)

    server, job = serve(busy), make_job(runtime={"concurrency": 1, "patience_seconds": 20})
    started = time.monotonic()
    run(job)
    assert time.monotonic() - started > 0.2
    assert summary_of(job)["value"] == 0.75 and len(server.asked) == 8 + 3


def test_a_server_that_asks_for_more_than_our_patience_is_told_of_at_once(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    server = serve(lambda _: Refuse(429, "quota", headers={"Retry-After": "3600"}))
    with pytest.raises(
        Exception,
        match=r"did not answer within 1 s \(runtime.patience_seconds\): status 429, which asks to wait 3600 s: quota",
    ):
        run(make_job(runtime={"concurrency": 1}))
    assert len(server.asked) == 1


def test_what_is_no_chat_completion_is_tried_again(serve: Callable[[Rule], ChatServer], make_job: JobMaker) -> None:
    broken: Iterator[bytes] = iter([b"<html>", b'{"choices": []}'])

    def half(messages: Messages) -> str | bytes:
        return next(broken, None) or prefer_longer(messages)

    serve(half)
    job = make_job(runtime={"concurrency": 1, "patience_seconds": 20})
    run(job)
    assert summary_of(job)["value"] == 0.75


def test_one_refused_request_is_left_out_and_all_refused_is_an_error(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    def filtered(messages: Messages) -> str | Refuse:
        return Refuse(400, "content_filter") if "Question 2?" in messages[1]["content"] else prefer_longer(messages)

    serve(filtered)
    job = make_job(items=4)
    run(job)
    found = summary_of(job)
    assert (found["items"], found["refused_judgements"]) == (3, 2)
    assert found["flag_sample_1"] == "no verdict: 'status 400: content_filter'"
    server = serve(lambda _: Refuse(400, "unknown parameter"))
    with pytest.raises(Exception, match=r"10 requests were refused; the last one: status 400: unknown parameter"):
        run(make_job(items=100, folder="other"))
    assert len(server.asked) < 20


def test_a_reasoning_model_says_what_it_takes_and_gets_it(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    """What OpenAI's reasoning models refuse, in the words of its documentation and of those who met it."""

    def reasoning(messages: Messages) -> str | Refuse:
        body = server.asked[-1]
        if "max_tokens" in body:
            words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            error = {"message": words, "param": "max_tokens", "code": "unsupported_parameter"}
            return Refuse(400, json.dumps({"error": error}))
        if body["temperature"] != 1:
            words = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
            return Refuse(400, json.dumps({"error": {"message": words, "code": "unsupported_value"}}))
        return prefer_longer(messages)

    server, runtime = serve(reasoning), {"concurrency": 1, "cap_parameter": "max_completion_tokens"}
    with pytest.raises(
        Exception, match=r"127\.0\.0\.1 refuses max_tokens: status 400: .*; set runtime.cap_parameter to max_c"
    ):
        run(make_job(runtime={"concurrency": 1}))
    with pytest.raises(Exception, match=r"refuses temperature: .*; set judging.judge.temperature to one that it takes"):
        run(make_job(runtime=runtime))
    assert len(server.asked) == 2, "what every request would be refused for is asked once"
    drawing = JUDGE | {"temperature": 1.0}
    run(make_job(runtime=runtime, judge=drawing))
    assert server.asked[-1]["max_completion_tokens"] == 2048
    job = make_job(judge=drawing)
    run(job)
    assert summary_of(job)["calls_now"] == 0, "by either name it is the same question"


def test_a_dying_endpoint_leaves_what_it_said_and_a_rerun_goes_on(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    left = iter(range(7))
    lock = threading.Lock()

    def dying(messages: Messages) -> str:
        with lock:
            if next(left, None) is None:
                raise Hang
        return prefer_longer(messages)

    serve(dying)
    job = make_job(items=10)
    with pytest.raises(
        Exception,
        match=r"did not answer within 1 s.*; 7 of 20 calls of this round are answered and kept; run the same again",
    ):
        run(job)
    assert count_kept(job) == 7
    server = serve(prefer_longer)
    run(job)
    assert len(server.answered) == 13
    assert summary_of(job) | {"calls_now": 0} == summary_of(job) | {"calls_now": 0, "calls": 20, "value": 0.9}


@pytest.mark.parametrize(("budget", "calls"), [({"max_calls": 5}, {5}), ({"max_tokens": 700}, {7, 8})])
def test_a_spent_budget_stops_and_loses_nothing(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker, budget: dict[str, int], calls: set[int]
) -> None:
    """Of tokens, the call that was under way when they were spent is paid for too."""
    server, job = serve(prefer_longer), make_job(items=6, runtime=budget | {"concurrency": 1})
    with pytest.raises(
        ValueError, match=r"the budget is spent, \d calls .* \d of 12 calls of this round are answered and kept"
    ):
        run(job)
    spent = len(server.answered)
    assert spent in calls and count_kept(job) == spent
    with pytest.raises(ValueError, match="the budget is spent"):
        run(job)
    assert len(server.answered) == spent, "a rerun under the same budget asks nothing"
    run(make_job(items=6))
    assert len(server.answered) == 12


def test_a_token_budget_needs_an_endpoint_that_counts(serve: Callable[[Rule], ChatServer], make_job: JobMaker) -> None:
    answer = {"choices": [{"message": {"content": "[[A>B]]"}, "finish_reason": "stop"}]}
    serve(lambda _: json.dumps(answer).encode())
    with pytest.raises(Exception, match=r"does not say how many tokens a call takes.*set runtime.max_calls instead"):
        run(make_job(runtime={"max_tokens": 1000}))


def test_a_finished_evaluation_is_made_again_without_a_call(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    server, job = serve(prefer_longer), make_job()
    run(job)
    first = summary_of(job)
    run(job)
    assert len(server.answered) == 8
    assert summary_of(job) == first | {"calls_now": 0}


def test_another_judge_takes_no_answer_of_this_one(serve: Callable[[Rule], ChatServer], make_job: JobMaker) -> None:
    server = serve(prefer_longer)
    run(make_job())
    run(make_job(judge=JUDGE | {"revision": "2027"}))
    assert len(server.answered) == 16


def test_calls_go_out_together_but_never_more_than_asked_for(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    def slow(messages: Messages) -> str:
        time.sleep(0.05)
        return prefer_longer(messages)

    server = serve(slow)
    run(make_job(items=12, runtime={"concurrency": 3}))
    assert server.most_at_once == 3


def test_a_request_to_stop_ends_it_with_what_is_under_way(
    serve: Callable[[Rule], ChatServer], make_job: JobMaker
) -> None:
    job = make_job(items=12, runtime={"concurrency": 2})

    def stopping(messages: Messages) -> str:
        time.sleep(0.05)
        if len(server.asked) >= 5:
            job.stop.set()
        return prefer_longer(messages)

    server = serve(stopping)
    with pytest.raises(Interrupted):
        run(job)
    assert 5 <= len(server.asked) == len(server.answered) == count_kept(job) < 24


def test_repeats_are_asked_of_a_judge_that_draws(serve: Callable[[Rule], ChatServer], make_job: JobMaker) -> None:
    drawn = iter(["[[A>B]]", "[[B>A]]", "[[B>A]]", "[[A>B]]"] + ["[[A>B]]"] * 4)  # ours twice, then theirs; the place
    server = serve(lambda _: next(drawn))
    job = make_job(items=2, repeats=2, judge=JUDGE | {"temperature": 1.0}, runtime={"concurrency": 1})
    run(job)
    found = summary_of(job)
    assert len(server.answered) == 8 and found["repeat_agreement"] == 0.5
    assert (found["value"], found["flip_rate"], found["max_difference"]) == (0.5, 0.5, 0.5)
    told = describe(found, config=JudgeConfig.model_validate(job.config))
    assert (told["noise/evalbiasbench/judge_flip_rate"], told["noise/evalbiasbench/judge_max_difference"]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="repeats: got 2 of a judge that does not draw"):
        make_job(repeats=2)


def test_kill_minus_nine_repeats_no_answered_call(serve: Callable[[Rule], ChatServer], make_job: JobMaker) -> None:
    def slow(messages: Messages) -> str:
        time.sleep(0.05)
        return prefer_longer(messages)

    server, job = serve(slow), make_job(items=30, runtime={"concurrency": 1})
    assert job.file
    environment = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT), "PATH": os.defpath}
    command = [sys.executable, "-m", "evaluation", str(job.file)]
    child = subprocess.Popen(command, env=environment, cwd=job.file.parent, stdin=subprocess.PIPE)
    hand_over(child, f"{KEY}\n{server.url}\n")
    deadline = time.monotonic() + 120
    while count_kept(job) < 10:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = [json.loads(line)[0] for line in (job.output / "calls.jsonl").read_text().splitlines()[1:]]
    assert 10 <= len(kept) < 60
    run(Job.read(job.file))
    assert summary_of(job)["calls"] == 60 and summary_of(job)["calls_now"] == 60 - len(kept)
    seen = [json.dumps(messages) for messages in server.answered]
    assert len(set(seen)) == 60 and len(seen) <= 61, "only the call that was under way may be made twice"


def test_no_address_is_said(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(
        ValueError, match="got no address; expected the endpoint's key, or an empty line, and its address"
    ):
        run(make_job())


@pytest.mark.parametrize(
    ("said", "margin"),
    [
        ("[[A>B]]", 1),
        ("First I thought [[A>B]], but: [[b>>a]]", -2),
        ("My final verdict is tie: [[A=B]]", 0),
        ("[[A<<B]]", -2),
        ("[[A]]", None),
        ("[[A>B>A]] or so", None),
        ("A>B", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_label(said: str, margin: int | None) -> None:
    assert PAIRWISE.read(said) == margin


def test_no_text_of_an_answer_becomes_a_part_of_the_template() -> None:
    asked = PAIRWISE.ask("{ANSWER_A} {QUESTION}", "{ANSWER_B}", "two")[1]["content"]
    assert re.findall(r"\{\w+\}", asked) == ["{ANSWER_A}", "{QUESTION}", "{ANSWER_B}"] and asked.count("two") == 1


def test_answers_to_one_prompt_are_one_cluster(tmp_path: Path) -> None:
    for who in ("ours", "theirs"):
        (tmp_path / who).mkdir()
        rows = [
            {"row_id": f"{n:032x}", "prompt": [{"role": "user", "content": f"Question {n % 2}?"}]} for n in range(6)
        ]
        told = [row | {"responses": [f"{who} {n}", who], "truncated": [False, False]} for n, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(told), tmp_path / who / "responses.parquet")
    config = JudgeConfig.model_validate({"benchmark": "heldout", "judge": JUDGE})
    pairs = pair_heldout(tmp_path / "ours", tmp_path / "theirs", config=config)
    assert len({pair.id for pair in pairs}) == 12 and len({pair.cluster for pair in pairs}) == 2
    assert {pair.question for pair in pairs if pair.cluster == pairs[0].cluster} == {"Question 0?"}
