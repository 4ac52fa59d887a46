"""The sets that test judges: the better answer is the chosen one, and a broken file is refused by place."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evaluation.judges.sets import LLMBAR_SUBSETS, JudgeItem, read_evalbiasbench, read_llmbar

BIAS = {"bias": "length bias", "instruction": "Add 1 and 1.", "response1": "2", "response2": "It is 3.", "label": 1}
BAR = {"input": "Add 1 and 1.", "output_1": "It is 3.", "output_2": "2", "label": 2}


def write_bias(folder: Path, content: Any) -> Path:
    (folder / "biasbench.json").write_text(json.dumps(content))
    return folder


def write_llmbar(folder: Path, **rows: Any) -> Path:
    for subset in LLMBAR_SUBSETS:
        (folder / subset).mkdir(parents=True, exist_ok=True)
        (folder / subset / "dataset.json").write_text(json.dumps(rows.get(Path(subset).name, [BAR])))
    return folder


def test_the_label_names_the_chosen_answer(tmp_path: Path) -> None:
    items = read_evalbiasbench(write_bias(tmp_path, {"length bias": [BIAS, BIAS | {"label": 2}]}))
    assert items == [
        JudgeItem("length bias/0", "length bias", "Add 1 and 1.", chosen="2", rejected="It is 3."),
        JudgeItem("length bias/1", "length bias", "Add 1 and 1.", chosen="It is 3.", rejected="2"),
    ]
    bar = read_llmbar(write_llmbar(tmp_path, Manual=[BAR, BAR | {"label": 1}]))
    assert [item.group for item in bar[:4]] == list(LLMBAR_SUBSETS[:4])
    assert bar[-2:] == [
        JudgeItem("Adversarial/Manual/0", "Adversarial/Manual", "Add 1 and 1.", chosen="2", rejected="It is 3."),
        JudgeItem("Adversarial/Manual/1", "Adversarial/Manual", "Add 1 and 1.", chosen="It is 3.", rejected="2"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"length bias": [BIAS, BIAS | {"label": 0}]},
            "first, at length bias, 1, label: Input should be 1 or 2, got '0'",
        ),
        ({"length bias": [{**BIAS, "response2": " "}]}, "length bias, 0, response2"),
        ({"length bias": [{**BIAS, "response2": "2"}]}, "both answers are the same text"),
        ({"length bias": [{k: v for k, v in BIAS.items() if k != "instruction"}]}, "Field required"),
        ([BIAS], "at the file: Input should be an object"),
        ({}, "no items"),
    ],
)
def test_a_broken_file_is_refused_by_place(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"EvalBiasBench .*biasbench.json") as refusal:
        read_evalbiasbench(write_bias(tmp_path, content))
    assert said in str(refusal.value)


def test_a_missing_or_torn_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"EvalBiasBench: no file .*biasbench.json"):
        read_evalbiasbench(tmp_path)
    folder = write_llmbar(tmp_path)
    torn = folder / "Adversarial/GPTOut/dataset.json"
    torn.write_text('[{"input": "a"')
    with pytest.raises(ValueError, match=r"GPTOut/dataset.json: 1 faults; first, at the file: Invalid JSON"):
        read_llmbar(folder)
    torn.unlink()
    with pytest.raises(ValueError, match=r"LLMBar: no file .*GPTOut/dataset.json"):
        read_llmbar(folder)


def test_the_real_files_are_read_whole(real_data: Path) -> None:
    biases = read_evalbiasbench(real_data / "evalbiasbench")
    assert Counter(item.group for item in biases) == {
        "length bias": 17,
        "concreteness": 14,
        "empty reference": 13,
        "content_continuation": 12,
        "nested_instruction": 12,
        "familiar knowledge preference bias": 12,
    }
    assert biases[0].chosen.startswith("Person A: Hi, how are you?") and len(biases[0].chosen) < 200
    bar = read_llmbar(real_data / "llmbar")
    sizes = {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
    assert Counter(Path(item.group).name for item in bar) == sizes
    for items in (biases, bar):
        assert len({item.id for item in items}) == len(items)
