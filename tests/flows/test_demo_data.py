"""The demo's own data, worked out again: nothing in it may be wrong, copied, or decided by length."""

import csv
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flows

DEMO = Path(flows.__file__).parent / "demo"
BENCHMARKS = DEMO / "benchmarks"
SUBJECTS = ("elementary_mathematics", "high_school_geography", "miscellaneous")
MARK = re.compile(r"<<([0-9+\-*/.()]+)=([0-9.]+)>>")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def find_fault(row: dict[str, Any], *, others: list[dict[str, Any]]) -> str | None:
    """Name what is wrong with a preference row, seen on its own and beside the others."""
    if set(row) != {"prompt", "chosen", "rejected"}:
        return "missing"
    if not row["rejected"]:
        return "empty"
    if row["chosen"] == row["rejected"]:
        return "same"
    if row | {"chosen": row["rejected"], "rejected": row["chosen"]} in others:
        return "contradiction"
    return "copy" if row in others else None


def simulate(instructions: str) -> tuple[int, int]:
    """Walk the steps of a navigate item and return where they end."""
    faces_forward = instructions.startswith("Always face forward. ")
    position, heading = 0j, 1j
    sides = {"forward": 1j, "backward": -1j, "left": -1, "right": 1, "": 1j}
    for sentence in instructions.removeprefix("Always face forward. ").removesuffix(".").split(". "):
        if sentence.startswith("Turn"):
            heading *= {"left": 1j, "right": -1j, "around": -1}[sentence.split()[1]]
            assert not faces_forward
        else:
            count, side = re.fullmatch(r"Take (\d+) steps?(?: (\w+))?", sentence).groups()
            position += int(count) * (sides[side] if side else heading)
    return round(position.real), round(position.imag)


def mmlu_items() -> Iterator[tuple[str, str, list[str], str]]:
    for split in ("test", "dev"):
        for subject in SUBJECTS:
            with (BENCHMARKS / "mmlu" / "data" / split / f"{subject}_{split}.csv").open(newline="") as file:
                rows = list(csv.reader(file))
            assert rows[0] == ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
            for question, *choices, answer in rows[1:]:
                yield split, question, choices, answer


def benchmark_questions() -> list[str]:
    """Return the text of every benchmark item, worked examples included."""
    questions = [question for _, question, _, _ in mmlu_items()]
    for split in ("train", "test"):
        questions += [row["question"] for row in read_lines(BENCHMARKS / "gsm8k" / f"{split}.jsonl")]
    questions += [row["prompt"] for row in read_lines(BENCHMARKS / "humaneval" / "HumanEval.jsonl")]
    for task in ("boolean_expressions", "navigate"):
        examples = json.loads((BENCHMARKS / "bbh" / "bbh" / f"{task}.json").read_text())["examples"]
        questions += [example["input"] for example in examples]
    return questions


def test_the_broken_rows_are_exactly_the_ones_that_the_readme_names() -> None:
    rows = read_lines(DEMO / "preferences.jsonl")
    assert len(rows) == 169
    faults = {n: find_fault(row, others=rows[: n - 1] + rows[n:]) for n, row in enumerate(rows, start=1)}
    found = {n: fault for n, fault in faults.items() if fault}
    assert found == {
        13: "copy",
        31: "empty",
        59: "same",
        91: "missing",
        102: "contradiction",
        141: "contradiction",
        161: "copy",
    }
    assert rows[12] == rows[160]
    more = read_lines(DEMO / "more_preferences.jsonl")
    assert len(more) == 60
    assert not any(find_fault(row, others=more[:n] + more[n + 1 :]) for n, row in enumerate(more))


def test_ingest_takes_the_sound_rows_and_quarantines_the_broken_ones(tmp_path: Path) -> None:
    """Runs the real job, with the default limit on the invalid share."""
    for name, kept, reasons in (
        (
            "preferences.jsonl",
            163,
            {"contradiction": 2, "duplicate": 1, "empty_response": 1, "missing_field": 1, "same_responses": 1},
        ),
        ("more_preferences.jsonl", 60, {}),
    ):
        output = tmp_path / name / "output"
        job = {"job": "ingest", "config": {"responses": "support", "heldout_fraction": 0.2}, "runtime": {}}
        job |= {"inputs": {"source": str(DEMO / name)}, "output": str(output), "work": str(tmp_path / name / "work")}
        (tmp_path / f"{name}.job").write_text(json.dumps(job))
        subprocess.run([sys.executable, "-P", "-m", "training", str(tmp_path / f"{name}.job")], check=True)
        quarantined = Counter(row["reason"] for row in read_lines(output / "quarantine.jsonl"))
        assert quarantined == reasons
        counts = json.loads((output / "summary.json").read_text())
        assert counts["train"] + counts["heldout"] == kept, counts


def test_rows_are_short_text_and_prompts_are_distinct() -> None:
    prompts = []
    for name in ("preferences.jsonl", "more_preferences.jsonl"):
        for row in read_lines(DEMO / name):
            if find_fault(row, others=[]):
                continue
            prompt = row["prompt"]
            if isinstance(prompt, list):
                assert [turn["role"] for turn in prompt] == ["user", "assistant", "user"]
            texts = [as_text(prompt), row["chosen"], row["rejected"]]
            assert all(
                text == text.strip() and 2 < len(text) < 240 and text.replace("\n", "").isprintable()
                for text in texts[1:]
            ), row
            assert row["chosen"][-1] in '.!?"', "what is preferred ends"
            prompts.append(as_text(prompt))
    twice = {prompt for prompt, count in Counter(prompts).items() if count > 1}
    assert len(twice) == 2, "the copy and the contradiction alone share a prompt"


def test_length_does_not_give_the_answer_away() -> None:
    for name in ("preferences.jsonl", "more_preferences.jsonl"):
        rows = [row for row in read_lines(DEMO / name) if not find_fault(row, others=[])]
        for length in (len, lambda text: len(text.split())):
            gaps = [length(row["chosen"]) - length(row["rejected"]) for row in rows]
            longer_wins = sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)
            assert 0.42 < longer_wins < 0.58, name


def test_mmlu_is_well_formed_and_no_letter_is_favoured() -> None:
    items = list(mmlu_items())
    assert Counter(split for split, *_ in items) == {"test": 36, "dev": 15}
    assert all(len(set(choices)) == 4 and all(choices) and answer in "0123" for _, _, choices, answer in items)
    assert Counter(answer for split, *_, answer in items if split == "test") == dict.fromkeys("0123", 9)
    assert len({question for _, question, _, _ in items}) == 51


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("A baker sells", 6 * 7), ("What is 3/4 of 20", 3 / 4 * 20), ("A rectangle is 9", 2 * (9 + 4)),
        ("What is the remainder", 29 % 6), ("Which of these is equal to 2/5", 2 / 5), ("What is the value of 5", 5 + 3 * 4),
        ("What number comes next", 54 * 3), ("Solve for x", 14 + 9), ("What is 45 minus", 45 - 18),
        ("How many sides", 3 * 3), ("What is half of 86", 86 / 2), ("A box holds 12", 12 * 5), ("Round 3,487", round(3487, -2)),
    ],
)  # fmt: skip
def test_mmlu_sums_are_right(question: str, answer: float) -> None:
    ((choices, index),) = [(c, a) for _, q, c, a in mmlu_items() if q.startswith(question)]
    assert float(choices[int(index)].removesuffix(" cm").replace(",", "")) == pytest.approx(answer)


def test_gsm8k_answers_follow_from_their_calculator_marks() -> None:
    for split, count in (("train", 12), ("test", 10)):
        rows = read_lines(BENCHMARKS / "gsm8k" / f"{split}.jsonl")
        assert len(rows) == count
        for row in rows:
            marks = MARK.findall(row["answer"])
            assert marks
            for expression, result in marks:
                assert eval(expression) == float(result), row
                assert f"{expression} = <<{expression}={result}>>{result}" in row["answer"]
            assert row["answer"].endswith(f"\n#### {marks[-1][1]}")


def test_humaneval_solutions_pass_and_stubs_fail() -> None:
    rows = read_lines(BENCHMARKS / "humaneval" / "HumanEval.jsonl")
    assert [row["task_id"] for row in rows] == [f"Demo/{n}" for n in range(8)]
    for row in rows:
        assert set(row) == {"task_id", "prompt", "entry_point", "canonical_solution", "test"}
        call = f"{row['test']}\ncheck({row['entry_point']})\n"
        good = row["prompt"] + row["canonical_solution"] + call + "import doctest, sys; sys.exit(doctest.testmod()[0])"
        assert subprocess.run([sys.executable, "-I", "-c", good]).returncode == 0, row["task_id"]
        stub = row["prompt"] + "    return 12345\n" + call
        assert subprocess.run([sys.executable, "-I", "-c", stub], stderr=subprocess.DEVNULL).returncode == 1


def test_boolean_expressions_evaluate_to_their_targets() -> None:
    examples = json.loads((BENCHMARKS / "bbh/bbh/boolean_expressions.json").read_text())["examples"]
    for example in examples:
        assert re.fullmatch(r"(?:(?:True|False|not|and|or|\(|\)) )+is", example["input"])
        assert str(eval(example["input"].removesuffix(" is"))) == example["target"]
    assert Counter(example["target"] for example in examples) == {"True": 4, "False": 4}


def test_navigate_ends_where_its_targets_say() -> None:
    examples = json.loads((BENCHMARKS / "bbh/bbh/navigate.json").read_text())["examples"]
    for example in examples:
        question, instructions = example["input"].removesuffix("\nOptions:\n- Yes\n- No").split("? ", 1)
        assert question == "If you follow these instructions, do you return to the starting point"
        assert ("Yes" if simulate(instructions) == (0, 0) else "No") == example["target"], instructions
    assert Counter(example["target"] for example in examples) == {"Yes": 4, "No": 4}


def test_preferences_and_benchmarks_share_no_question() -> None:
    prompts = set()
    for name in ("preferences.jsonl", "more_preferences.jsonl"):
        for row in read_lines(DEMO / name):
            turns = [row["prompt"]] if isinstance(row["prompt"], str) else [t["content"] for t in row["prompt"]]
            prompts |= {normalise(turn) for turn in turns}
    questions = [normalise(question) for question in benchmark_questions()]
    assert len(questions) == len(set(questions)) == 51 + 22 + 8 + 16
    assert not prompts & set(questions)
    long = [prompt for prompt in prompts if len(prompt.split()) >= 5]
    assert not [(p, q) for p in long for q in questions if p in q or q in p]


def normalise(text: str) -> str:
    return " ".join(re.findall(r"\w+|[()]", text.lower()))


@pytest.mark.slow
def test_nothing_is_copied_from_the_real_data(real_data: Path) -> None:
    """Equal after normalisation to any real prompt, answer or item: none."""
    real: set[str] = set()
    for path in sorted(real_data.rglob("*")):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else None
        if path.parent.name == "bbh" and path.suffix == ".json":
            real |= {normalise(example["input"]) for example in json.loads(path.read_text())["examples"]}
        elif content and path.name.endswith(".csv.gz"):
            real |= {normalise(row[0]) for row in csv.reader(content.decode().splitlines(keepends=True)) if row}
        elif content and path.name.endswith(".jsonl.gz"):
            for line in content.decode().splitlines():
                real |= {normalise(part) for text in find_texts(json.loads(line)) for part in text.split("\n\n")}
    assert len(real) > 20_000
    ours = set(benchmark_questions())
    for name in ("preferences.jsonl", "more_preferences.jsonl"):
        ours |= {text for row in read_lines(DEMO / name) for text in find_texts(row)}
    copied = {text for text in ours if len(text.split()) > 3 and normalise(text) in real}
    assert not copied


def find_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield re.sub(r"^\s*(Human|Assistant):", "", value)
        yield from (re.sub(r"^(Human|Assistant):", "", part) for part in value.split("\n\n"))
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from find_texts(item)
