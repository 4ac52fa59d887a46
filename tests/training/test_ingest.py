"""Source rows become rows of one schema, each of them accounted for: kept, or in quarantine with its reason."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from training.config import IngestConfig, SourceFormat
from training.data.ingest import run
from training.data.rows import read_rows
from training.data.schema import SCHEMA, digest_row
from training.data.splits import choose_split
from training.data.validate import Reason, UnusableRow, detect_format, parse_row
from training.job import Job

CONFIG = IngestConfig(responses="support")
USER = {"role": "user", "content": "Hi"}
EXACT = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
SAMPLED = IngestConfig(responses="from_reference", **EXACT)


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair(n: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"Question {n}?", "chosen": f"Good answer {n}.", "rejected": f"Bad answer {n}."} | changes


def ingest(folder: Path, rows: list[Any], **config: Any) -> Job:
    """Run the job on rows written as JSON lines; a text is written as it is."""
    source = folder / "rows.jsonl"
    source.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return ingest_file(folder, source, **config)


def ingest_file(folder: Path, source: Path, **config: Any) -> Job:
    job = Job(
        name="ingest",
        config={"responses": "support", "heldout_fraction": 0.3, "max_invalid_fraction": 1.0} | config,
        runtime={},
        inputs={"source": source},
        output=folder / "output",
        work=folder / "work",
    )
    job.output.mkdir(exist_ok=True)
    job.work.mkdir(exist_ok=True)
    run(job)
    return job


def kept(job: Job) -> list[dict[str, Any]]:
    return [row for batch in read_rows(job.output) for row in batch.to_pylist()]


def quarantined(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.output / "quarantine.jsonl").read_text().splitlines()]


def test_a_row_stands_in_the_schema_as_the_source_meant_it(tmp_path: Path) -> None:
    job = ingest(tmp_path, [pair(n) for n in range(20)])
    rows = kept(job)
    assert pq.read_schema(job.output / "rows.parquet").equals(SCHEMA)
    prompt, responses = [{"role": "user", "content": "Question 3?"}], ["Good answer 3.", "Bad answer 3."]
    assert rows[3] == {
        "row_id": digest_row(prompt, responses),
        "split": choose_split(prompt, heldout_fraction=0.3),
        "prompt": prompt,
        "responses": responses,
        "preferred": 0,
        "truncated": None,
        "logq": None,
        "response_ids": None,
        "source": "rows.jsonl",
        "line": 4,
    }
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["rows"] == summary["prompts"] == 20 == summary["train"] + summary["heldout"]
    assert summary["responses"] == 40
    assert summary["mean_prompt_chars"] == pytest.approx((10 * 11 + 10 * 12) / 20)
    manifest = json.loads((job.output / "manifest.json").read_text())
    assert manifest["regime"] == "support" and manifest["files"] == ["rows.jsonl"]
    assert [path.name for path in job.work.iterdir()] == ["hardware.json"], (
        "of what the child ran on; nothing of the rows"
    )


@pytest.mark.parametrize(
    ("value", "format", "expected"),
    [
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So.",
             "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No."},
            "hh_rlhf",
            ([USER, say("Hello"), {"role": "user", "content": "Why?"}], ["So.", "No."], 0),
        ),
        ({"prompt": "Hi", "chosen": "A", "rejected": "B"}, "pairs", ([USER], ["A", "B"], 0)),
        ({"prompt": [USER], "chosen": [say("A")], "rejected": [say("B")]}, "pairs", ([USER], ["A", "B"], 0)),
        ({"chosen": [USER, say("A")], "rejected": [USER, say("B")]}, "pairs", ([USER], ["A", "B"], 0)),
        (
            {"prompt": "Hi", "chosen": [USER, say("A")], "rejected": [USER, say("B")], "score": 3},
            "pairs",
            ([USER], ["A", "B"], 0),
        ),
        ({"prompt": "Hi", "responses": ["A", "B", "C"], "preferred": 2}, "responses", ([USER], ["A", "B", "C"], 2)),
        ({"prompt": [USER], "responses": ["A", [say("B")]]}, "responses", ([USER], ["A", "B"], None)),
        (
            {"prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": "A", "rejected": "B"},
            "pairs",
            ([{"role": "system", "content": "Be brief."}, USER], ["A", "B"], 0),
        ),
        (
            {"prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": [USER, say("A")], "rejected": [say("B")]},
            "pairs",
            ([{"role": "system", "content": "Be brief."}, USER], ["A", "B"], 0),
        ),
        ({"prompt": [], "chosen": [USER, say("A")], "rejected": [USER, say("B")]}, "pairs", ([USER], ["A", "B"], 0)),
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:", "chosen": " So.", "rejected": " No."},
            "pairs",
            ([USER, say("Hello"), {"role": "user", "content": "Why?"}], ["So.", "No."], 0),
        ),
    ],
)  # fmt: skip
def test_every_shape_is_recognised_and_read(value: dict[str, Any], format: str, expected: tuple[Any, ...]) -> None:
    assert detect_format(value) == format
    row = parse_row(value, format=SourceFormat(format), config=CONFIG)
    assert (row.prompt, row.responses, row.preferred) == expected


def test_an_answer_that_was_cut_stays_marked_in_every_regime() -> None:
    """A stop token trained behind it would be one that nobody wrote."""
    cut = {"prompt": "Hi", "responses": ["A", "B", "A", "C"], "preferred": 2, "truncated": [False, True, False, True]}
    row = parse_row(cut, format=SourceFormat.responses, config=CONFIG)
    assert (row.responses, row.preferred, row.truncated) == (["A", "B", "C"], 0, [False, True, True])
    for wrong in ([True], ["yes"] * 4):
        with pytest.raises(UnusableRow, match="bad_truncated"):
            parse_row(cut | {"truncated": wrong}, format=SourceFormat.responses, config=CONFIG)


def test_among_samples_one_that_ended_at_once_stays() -> None:
    """Left out, what is left would be samples of a policy that never does so."""
    drawn = {"prompt": "Hi", "responses": ["A", ""], "logq": [-1.0, -(10**400)]}
    config = IngestConfig(responses="from_reference", **EXACT)
    assert parse_row(drawn, format=SourceFormat.responses, config=config).responses == ["A", ""]
    with pytest.raises(UnusableRow, match=r"bad_logq: logq\[1\] is -10+"):
        parse_row(drawn, format=SourceFormat.responses, config=IngestConfig(responses="from_behaviour"))
    with pytest.raises(ValueError, match="min_response_chars: got 2 for responses from_reference, expected 1"):
        IngestConfig(responses="from_reference", min_response_chars=2, **EXACT)


UNUSABLE = [
    (pair(0, chosen=""), Reason.empty_response),
    (pair(0, rejected=" \n"), Reason.empty_response),
    (pair(0, prompt=" "), Reason.empty_prompt),
    (pair(0, prompt=[]), Reason.empty_prompt),
    (pair(0, chosen="Bad answer 0."), Reason.same_responses),
    (pair(0, chosen=None), Reason.missing_field),
    (pair(0, chosen=7), Reason.missing_field),
    (pair(0, prompt=[{"role": "user"}]), Reason.missing_field),
    (pair(0, chosen="half \ud800 a pair"), Reason.not_text),
    (pair(0, chosen="x" * 20_000), Reason.too_long),
    (pair(0, prompt=[USER, say("Hello")]), Reason.last_turn_not_user),
    (pair(0, prompt=[USER, USER]), Reason.roles_out_of_order),
    (pair(0, prompt=[say("Hello"), USER]), Reason.roles_out_of_order),
    (pair(0, prompt=[USER, {"role": "system", "content": "Be brief."}, USER]), Reason.roles_out_of_order),
    (pair(0, prompt=[{"role": "tool", "content": "7"}, USER]), Reason.unknown_role),
    (pair(0, chosen=[USER]), Reason.last_turn_not_assistant),
    ({"chosen": [USER, say("A")], "rejected": [say("B")]}, Reason.missing_field),
    ({"chosen": [USER, say("A")], "rejected": [{**USER, "content": "Ho"}, say("B")]}, Reason.different_prompts),
    ({"prompt": "Ho", "chosen": [USER, say("A")], "rejected": [USER, say("B")]}, Reason.different_prompts),
    (
        {"prompt": [{**USER, "content": "Ho"}, say("Hello"), USER], "chosen": [USER, say("Hello"), USER, say("A")], "rejected": [say("B")]},
        Reason.different_prompts,
    ),
    ({"prompt": "\n\nHuman: Hi", "chosen": "A", "rejected": "B"}, Reason.last_turn_not_assistant),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": [say("A")], "rejected": [say("B")]}, Reason.missing_field),
    ({"prompt": "Hi", "responses": ["A"]}, Reason.missing_field),
    ({"prompt": "Hi", "responses": ["A", "A"]}, Reason.same_responses),
    ({"prompt": "Hi", "responses": ["A", "B"], "preferred": 2}, Reason.bad_preferred),
    ({"prompt": "Hi", "responses": ["A", "B"], "preferred": True}, Reason.bad_preferred),
    ({"chosen": "Human: Hi", "rejected": "Human: Ho"}, Reason.unknown_shape),
    ({"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"}, Reason.last_turn_not_assistant),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Ho\n\nAssistant: B"},
        Reason.different_prompts,
    ),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: A\n\nAssistant: B"},
        Reason.last_turn_not_user,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("value", "reason"), UNUSABLE)
def test_an_unusable_row_says_why(value: dict[str, Any], reason: Reason) -> None:
    format = detect_format(value)
    assert format is not None
    with pytest.raises(UnusableRow) as caught:
        parse_row(value, format=format, config=CONFIG)
    assert caught.value.reason is reason, caught.value


def test_no_row_is_dropped_silently(tmp_path: Path) -> None:
    good = [pair(n) for n in range(1, 31)]
    bad = [
        "{not json",
        "[1, 2]",
        '"text"',
        json.dumps({"a": 1}),
        *(value for value, _ in UNUSABLE if "prompt" in value),
    ]
    job = ingest(tmp_path, [*good[:15], *bad, *good[15:]])
    entries = quarantined(job)
    assert len(kept(job)) == 30
    lines = sorted([row["line"] for row in kept(job)] + [entry["line"] for entry in entries])
    assert lines == list(range(1, 31 + len(bad)))
    assert [entry["reason"] for entry in entries[:4]] == [
        "not_json", "unknown_shape", "unknown_shape", "missing_field",
    ]  # fmt: skip
    assert entries[0]["raw"] == "{not json"
    summary = json.loads((job.output / "summary.json").read_text())
    assert sum(summary["quarantined_by_reason"].values()) == summary["quarantined"] == len(bad)


def test_a_repeated_row_is_kept_once_and_named(tmp_path: Path) -> None:
    job = ingest(tmp_path, [*(pair(n) for n in range(10)), pair(4)])
    assert [row["line"] for row in kept(job)] == list(range(1, 11))
    (entry,) = quarantined(job)
    assert (entry["line"], entry["reason"]) == (11, "duplicate")
    assert entry["detail"].endswith("as rows.jsonl:5")


@pytest.mark.parametrize("regime", [{"responses": "from_reference", **EXACT}, {"responses": "from_behaviour"}])
def test_equal_rows_of_samples_are_draws_of_their_own(tmp_path: Path, regime: dict[str, Any]) -> None:
    """Keeping one of ("Yes", "No") three times would count a likely answer less often than it was drawn."""
    drawn = {"prompt": "Is it?", "responses": ["Yes", "No"], "logq": [-0.5, -1.5]}
    others = [{"prompt": f"Question {n}?", "responses": ["Yes", "No"], "logq": [-0.5, -1.5]} for n in range(20)]
    job = ingest(tmp_path, [drawn, *others, drawn, drawn], **regime)
    rows = kept(job)
    assert [row["line"] for row in rows] == list(range(1, 24)) and quarantined(job) == []
    assert len({row["row_id"] for row in rows}) == 23
    assert rows[0]["row_id"] == digest_row([{"role": "user", "content": "Is it?"}], ["Yes", "No"])
    assert json.loads((job.output / "summary.json").read_text())["repeated_samples"] == 2
    (tmp_path / "again").mkdir()
    again = ingest_file(tmp_path / "again", job.output / "rows.parquet", **regime)
    assert [row["row_id"] for row in kept(again)] == [row["row_id"] for row in rows]


@pytest.mark.parametrize("order", [[None, 0, None], [0, None], [None, None, 0]])
def test_a_preference_stands_for_equal_rows_without_one(tmp_path: Path, order: list[int | None]) -> None:
    """Wherever it stands: by the order of the lines it would be lost, and its prompt with it to what learns from preferences."""
    said = [{"prompt": "Is it?", "responses": ["Yes", "No"]} | ({} if p is None else {"preferred": p}) for p in order]
    others = [{"prompt": f"Question {n}?", "responses": ["Yes", "No"], "preferred": 1} for n in range(20)]
    job = ingest(tmp_path, [*said, *others])
    rows = kept(job)
    assert [(row["line"], row["preferred"]) for row in rows[:2]] == [(order.index(0) + 1, 0), (len(order) + 1, 1)]
    left_out = sorted((entry["line"], entry["reason"]) for entry in quarantined(job))
    assert left_out == [(line, "duplicate") for line, p in enumerate(order, start=1) if p is None]
    summary = json.loads((job.output / "summary.json").read_text())
    assert (summary["rows"], summary["prompts"]) == (21, 21)


@pytest.mark.parametrize("order", [[None, 0, 1], [0, None, 1], [0, 1, None]])
def test_rows_that_go_stand_for_no_other(tmp_path: Path, order: list[int | None]) -> None:
    said = [{"prompt": "Is it?", "responses": ["Yes", "No"]} | ({} if p is None else {"preferred": p}) for p in order]
    others = [{"prompt": f"Question {n}?", "responses": ["Yes", "No"], "preferred": 1} for n in range(20)]
    job = ingest(tmp_path, [*said, *others])
    assert kept(job)[0]["line"] == order.index(None) + 1 and kept(job)[0]["preferred"] is None
    assert [entry["reason"] for entry in quarantined(job)] == ["contradiction"] * 2


def test_rows_that_contradict_each_other_both_go(tmp_path: Path) -> None:
    swapped = pair(4, chosen="Bad answer 4.", rejected="Good answer 4.")
    job = ingest(tmp_path, [*(pair(n) for n in range(10)), swapped])
    assert [row["line"] for row in kept(job)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert {entry["line"]: (entry["reason"], entry["detail"]) for entry in quarantined(job)} == {
        5: ("contradiction", "rows.jsonl:11 prefers the other way round"),
        11: ("contradiction", "rows.jsonl:5 prefers the other way round"),
    }
    assert json.loads((job.output / "summary.json").read_text())["prompts"] == 9


@pytest.mark.parametrize("regime", [{"responses": "from_reference", **EXACT}, {"responses": "from_behaviour"}])
def test_judgements_of_samples_may_differ(tmp_path: Path, regime: dict[str, Any]) -> None:
    """The likeliest answers are drawn and judged most often; leaving out those that judges disagree on would leave out the policy."""
    drawn = [
        {"prompt": "Is it?", "responses": ["Yes", "No"], "preferred": preferred, "logq": [-0.5, -1.5]}
        for preferred in (0, 1, 0)
    ]
    others = [{"prompt": f"Question {n}?", "responses": ["Yes", "No"], "logq": [-0.5, -1.5]} for n in range(20)]
    job = ingest(tmp_path, [*drawn, *others], **regime)
    assert [row["preferred"] for row in kept(job)][:3] == [0, 1, 0] and quarantined(job) == []
    assert len({row["row_id"] for row in kept(job)}) == 23
    assert json.loads((job.output / "summary.json").read_text())["prompts"] == 21


def test_contradictions_are_found_between_sets_of_responses(tmp_path: Path) -> None:
    def group(responses: str, preferred: int | None, prompt: str = "Q") -> dict[str, Any]:
        return {"prompt": prompt, "responses": list(responses), "preferred": preferred}

    rows = [
        group("ABC", 0),  # A over B, A over C
        group("BAD", 0),  # B over A: against line 1
        group("CD", 0),  # C over D: nobody says otherwise
        group("AB", 0, prompt="R"),  # the same texts under another prompt
        group("EF", 0),
        group("EF", 1),  # the same row, the other way round
        group("GH", None),
        group("HG", 0),  # nobody preferred anything in line 7
        *(group("XY", 0, prompt=f"filler {n}") for n in range(20)),
    ]
    job = ingest(tmp_path, rows)
    assert {entry["line"]: entry["detail"].split()[0] for entry in quarantined(job)} == {
        1: "rows.jsonl:2", 2: "rows.jsonl:1", 5: "rows.jsonl:6", 6: "rows.jsonl:5",
    }  # fmt: skip
    assert len({row["row_id"] for row in kept(job)}) == len(kept(job)) == 24


def test_equal_responses_are_one_in_a_fixed_set_and_counted_in_a_sample() -> None:
    value = {"prompt": "Hi", "responses": ["A", "B", "A"], "preferred": 2}
    fixed = parse_row(value, format=SourceFormat.responses, config=CONFIG)
    assert (fixed.responses, fixed.preferred) == (["A", "B"], 0)
    sampled = parse_row(value, format=SourceFormat.responses, config=SAMPLED)
    assert (sampled.responses, sampled.preferred) == (["A", "B", "A"], 2)


def test_the_manifest_says_how_samples_were_drawn(tmp_path: Path) -> None:
    job = ingest(tmp_path, [pair(n) for n in range(20)], responses="from_reference", temperature=0.7, top_p=1, top_k=50)
    manifest = json.loads((job.output / "manifest.json").read_text())
    assert (manifest["temperature"], manifest["top_p"], manifest["top_k"]) == (0.7, 1.0, 50)


def test_how_samples_were_drawn_must_be_stated_and_a_fixed_set_was_not_drawn() -> None:
    with pytest.raises(ValueError, match="from_reference: top_p, top_k not stated"):
        IngestConfig(responses="from_reference", temperature=1.0)
    with pytest.raises(ValueError, match="support: got temperature, but a fixed set was not sampled"):
        IngestConfig(responses="support", temperature=1.0)
    assert IngestConfig(responses="from_behaviour", temperature=0.7).top_k is None  # log q says all that counts


BEHAVED = IngestConfig(responses="from_behaviour")


def test_log_q_comes_with_samples_of_another_policy() -> None:
    value = {"prompt": "Hi", "responses": ["A", "B", "A"], "logq": [-1.5, 0, -1.5], "truncated": [False, True, False]}
    row = parse_row(value, format=SourceFormat.responses, config=BEHAVED)
    assert (row.responses, row.logq, row.truncated) == (["A", "B", "A"], [-1.5, 0.0, -1.5], [False, True, False])
    assert parse_row(value, format=SourceFormat.responses, config=SAMPLED).logq is None  # not part of its weight
    fixed = parse_row(value, format=SourceFormat.responses, config=CONFIG)
    assert (fixed.logq, fixed.truncated) == (None, [False, True])  # of the two that differ
    two = {"prompt": "Hi", "chosen": "A", "rejected": "B", "logq": [-1, -2]}
    assert parse_row(two, format=SourceFormat.pairs, config=BEHAVED).logq == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, Reason.missing_logq),
        ({"logq": None}, Reason.missing_logq),
        ({"logq": [-1.0]}, Reason.bad_logq),
        ({"logq": -1.0}, Reason.bad_logq),
        ({"logq": [-1.0, 0.5]}, Reason.bad_logq),  # a probability above 1
        ({"logq": [-1.0, float("nan")]}, Reason.bad_logq),
        ({"logq": [-1.0, float("-inf")]}, Reason.bad_logq),
        ({"logq": [-1.0, "-2"]}, Reason.bad_logq),
        ({"logq": [-1.0, False]}, Reason.bad_logq),
        ({"logq": [-1.0, -2.0], "truncated": [True]}, Reason.bad_truncated),
        ({"logq": [-1.0, -2.0], "truncated": [0, 1]}, Reason.bad_truncated),
    ],
)
def test_samples_of_another_policy_without_their_log_q_are_quarantined(changes: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(UnusableRow) as caught:
        parse_row({"prompt": "Hi", "responses": ["A", "B"], **changes}, format=SourceFormat.responses, config=BEHAVED)
    assert caught.value.reason == reason


def test_log_q_stands_in_the_rows_and_survives_another_ingestion(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "responses": [f"A{n}", "B"], "logq": [-1.25, -n]} for n in range(30)]
    rows.append({"prompt": "Question 30?", "responses": ["A", "B"]})
    job = ingest(tmp_path, rows, responses="from_behaviour")
    assert [row["logq"] for row in kept(job)] == [[-1.25, float(-n)] for n in range(30)]
    assert [entry["reason"] for entry in quarantined(job)] == ["missing_logq"]
    (tmp_path / "again").mkdir()
    again = ingest_file(tmp_path / "again", job.output / "rows.parquet", responses="from_behaviour")
    assert [row["logq"] for row in kept(again)] == [row["logq"] for row in kept(job)]


def test_equal_prompts_share_a_split_whatever_the_order(tmp_path: Path) -> None:
    rows = [pair(n % 40, chosen=f"Answer {n}") for n in range(120)]
    split_of: dict[str, set[str]] = {}
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).mkdir()
        for row in kept(ingest(tmp_path / name, order)):
            split_of.setdefault(row["prompt"][0]["content"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in split_of.values()) and len(split_of) == 40


def test_the_split_has_the_share_it_was_given_and_only_grows_with_it() -> None:
    prompts = [[{"role": "user", "content": f"Question {n}"}] for n in range(4000)]
    chosen = {
        fraction: {
            n for n, prompt in enumerate(prompts) if choose_split(prompt, heldout_fraction=fraction) == "heldout"
        }
        for fraction in (0.1, 0.3)
    }
    for fraction, heldout in chosen.items():
        assert len(heldout) / 4000 == pytest.approx(fraction, abs=4 * (fraction * (1 - fraction) / 4000) ** 0.5)
    assert chosen[0.1] < chosen[0.3]


def test_a_limit_takes_the_first_rows_of_the_source(tmp_path: Path) -> None:
    job = ingest(tmp_path, [pair(0, chosen=""), *(pair(n) for n in range(1, 50))], limit=20)
    assert [row["line"] for row in kept(job)] == list(range(2, 21))
    assert json.loads((job.output / "summary.json").read_text())["read"] == 20


def test_files_of_two_formats_can_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(pair(n)) + "\n" for n in range(20)))
    (folder / "b.json").write_text(json.dumps([{"prompt": f"P{n}", "responses": ["A", "B"]} for n in range(20)]))
    rows = kept(ingest_file(tmp_path, folder))
    assert [(row["source"], row["preferred"]) for row in rows] == [("a.jsonl", 0)] * 20 + [("b.json", None)] * 20


def test_its_own_rows_can_be_ingested_again(tmp_path: Path) -> None:
    first = ingest(tmp_path, [pair(n) for n in range(30)])
    (tmp_path / "again").mkdir()
    again = ingest_file(tmp_path / "again", first.output / "rows.parquet")
    assert [row["row_id"] for row in kept(again)] == [row["row_id"] for row in kept(first)]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "output").iterdir() if path.name != "metrics.jsonl")


def test_too_many_unusable_rows_are_refused_with_reasons_and_a_number(tmp_path: Path) -> None:
    rows = [pair(n, chosen="" if n % 10 == 0 else f"A{n}") for n in range(40)] + ["{"]
    with pytest.raises(ValueError) as caught:
        ingest(tmp_path, rows, max_invalid_fraction=0.1)
    message = str(caught.value)
    assert "5 of 41 rows are unusable" in message
    assert (
        "empty_response 4 (first: rows.jsonl:1, rows.jsonl:11, rows.jsonl:21), not_json 1 (first: rows.jsonl:41)"
        in message
    )
    assert message.endswith("raise max_invalid_fraction to 0.122")
    assert leftovers(tmp_path) == []
    assert (
        len(kept(ingest(tmp_path, rows, max_invalid_fraction=0.122))) == 36
    )  # the advice holds, and a rerun finds its way


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got no rows"),
        ([pair(1)], "none of 1 prompts fell into the (train|heldout) split at heldout_fraction 0.3"),
        ([pair(1, chosen="")], "none of 0 prompts fell into the train split"),
    ],
)
def test_a_source_that_cannot_be_split_is_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ingest(tmp_path, rows)
    assert leftovers(tmp_path) == []


def test_an_unknown_key_of_the_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heldout"):
        ingest(tmp_path, [pair(1)], heldout=0.2)


@pytest.mark.slow
def test_real_rows_are_all_accounted_for(tmp_path: Path, real_data: Path) -> None:
    """The counts of equal and of different pairs are those that the data's own SOURCE.md states."""
    job = ingest_file(tmp_path, real_data / "hh-rlhf", max_invalid_fraction=0.05)
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["read"] == 4666 == summary["rows"] + summary["quarantined"]
    assert summary["quarantined_by_reason"]["same_responses"] == 2
    assert summary["quarantined_by_reason"]["different_prompts"] == 14


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks = {}
    for count in (1_000, 100_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        with (folder / "rows.jsonl").open("w") as out:
            for n in range(count):
                out.write(
                    json.dumps(pair(n, prompt=f"Question {n} " + "why " * 60, chosen=f"{n} " + "so " * 60)) + "\n"
                )
        job = {
            "job": "ingest", "config": {"responses": "support"}, "runtime": {},
            "inputs": {"source": str(folder / "rows.jsonl")}, "output": str(folder / "o"), "work": str(folder / "w"),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        peaks[count] = peak_kilobytes([sys.executable, "-m", "training", str(folder / "job.json")])
        assert json.loads((folder / "o" / "summary.json").read_text())["rows"] == count
    assert peaks[100_000] <= 1.1 * peaks[1_000], peaks


def peak_kilobytes(command: list[str]) -> int:
    """Run a command and return the peak resident memory of its process."""
    watch = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", watch, *command], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])
