"""Benchmark items in training data: what is a hit, against a search by hand and a plain one, and the scores beside it."""

import math
import random
from itertools import pairwise

import pytest

from evaluation.harness import contamination
from evaluation.harness.contamination import (
    Contamination,
    Index,
    choose_n,
    find_hits,
    flag_contamination,
    measure_contamination,
    split_words,
)
from evaluation.harness.result import BenchmarkResult, ItemKey

FOX = "The quick brown fox jumps over the lazy dog near the river bank."  # 13 words
SEA = "Which of these animals lives in the deep sea and makes its own light?"  # 14


def result(questions: list[str], correct: list[float] | None = None, *, name: str = "quiz") -> BenchmarkResult:
    keys = [("task", str(i)) for i in range(len(questions))]
    items = dict(zip(keys, correct or [1.0] * len(questions), strict=True))
    return BenchmarkResult(
        benchmark=name, scores=(), items=items, profile={}, questions=dict(zip(keys, questions, strict=True))
    )


def measure(questions: list[str], texts: list[str], correct: list[float] | None = None) -> Contamination:
    one = result(questions, correct)
    (found,) = measure_contamination([one], [one], [(f"row {i}", text) for i, text in enumerate(texts)])
    return found


def test_n_is_the_fifth_percentile_of_the_lengths_between_8_and_13() -> None:
    assert choose_n([3] * 50) == 8
    assert choose_n([200] * 50) == 13
    assert choose_n([10, *[40] * 4]) == 13  # of five lengths it lies between the two shortest: 10 + 0.2 * 30 = 16
    assert choose_n([9] * 3 + [40] * 20) == 9
    assert split_words("Don't STOP,\n2.5 apples!") == ["don", "t", "stop", "2", "5", "apples"]


def test_of_one_model_alone_every_benchmark_is_told() -> None:
    one = result([FOX, SEA], [1.0, 0.0])
    (found,) = measure_contamination([one], None, [("row 0", FOX)])
    assert (found.hits, found.challenger.value, found.champion, found.champion_clean) == (1, 0.5, None, None)
    assert found.challenger_clean and (found.challenger_clean.items, found.challenger_clean.value) == (1, 0.0)
    (flag,) = flag_contamination(found)
    assert "the model scores 50.0" in flag
    assert measure_contamination([one], [], [("row 0", FOX)]) == [], "a champion without that benchmark"


def test_case_punctuation_and_what_stands_around_do_not_hide_an_item() -> None:
    found = measure(
        [FOX, SEA],
        [
            "Nothing here.",
            "He wrote: THE quick, brown fox -- jumps over; the lazy dog near the river bank!!! And left.",
        ],
    )
    assert (found.n, found.items, found.hits, found.short) == (13, 2, 1, 0)
    (hit,) = found.samples
    assert (hit.doc_id, hit.row_id) == ("0", "row 1")
    assert hit.ngram == "the quick brown fox jumps over the lazy dog near the river bank"


def test_fewer_words_in_common_or_words_of_two_texts_are_no_hit() -> None:
    words = FOX.split()
    changed = [*words[:6], "some", *words[7:]]
    assert measure([FOX], [" ".join(changed), " ".join(words[:6])]).hits == 0
    assert measure([FOX], [" ".join(words[:6]), " ".join(words[6:])]).hits == 0
    assert measure([FOX], []).hits == 0


def test_what_many_items_say_alike_makes_no_hit_and_what_a_few_say_does() -> None:
    form = "answer the following question with one of the letters a b c or d please"
    questions = [f"{form} {' '.join(f'word{i}x{j}' for j in range(8))}" for i in range(12)]
    assert measure(questions, [form]).hits == 0
    assert measure(questions[:10], [form]).hits == 10
    assert measure(questions, [questions[3]]).hits == 1


def test_items_with_fewer_words_are_counted_and_never_hits() -> None:
    found = measure(["Is it so?", FOX], ["Is it so? " + FOX])
    assert (found.n, found.short, found.hits) == (8, 1, 1)


def test_both_scores_stand_with_and_without_the_hits() -> None:
    questions = [FOX, SEA, "one two three four five six seven eight nine ten eleven twelve thirteen"]
    challenger, champion = result(questions, [1.0, 0.0, 0.0]), result(questions, [0.0, 0.0, 1.0])
    (found,) = measure_contamination([challenger], [champion], [("abc", FOX)])
    assert found.challenger.value == pytest.approx(1 / 3) and found.share == pytest.approx(1 / 3)
    assert found.challenger.stderr == pytest.approx(math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2 / 3))
    assert found.challenger_clean and found.champion_clean
    assert (found.challenger_clean.value, found.challenger_clean.stderr, found.challenger_clean.items) == (0.0, 0.0, 2)
    assert (found.champion_clean.value, found.champion_clean.stderr) == (0.5, pytest.approx(0.5))
    (flag,) = flag_contamination(found)
    assert flag.startswith(
        "quiz: 1 of 3 items (33.3%) share 13 words in a row with the training data (first: task, document 0, in row abc:"
    )
    assert flag.endswith("the challenger scores 33.3 ± 33.3 points on all, without them 0.0 ± 0.0 on 2")
    (all_gone,) = measure_contamination([result([FOX])], [result([FOX])], [("abc", FOX)])
    assert all_gone.challenger_clean is None and all_gone.challenger.stderr is None
    assert flag_contamination(all_gone)[0].endswith("no item is left without them")
    assert flag_contamination(measure([FOX], [SEA])) == []


def find_plainly(questions: dict[ItemKey, str], texts: list[tuple[str, str]], *, n: int) -> dict[ItemKey, str]:
    """Return {item: its first row} by sets of word tuples."""

    def ngrams(text: str) -> list[tuple[str, ...]]:
        words = split_words(text)
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    owners: dict[tuple[str, ...], set[ItemKey]] = {}
    for key, question in questions.items():
        for ngram in ngrams(question):
            owners.setdefault(ngram, set()).add(key)
    found: dict[ItemKey, str] = {}
    for row, text in texts:
        for ngram in ngrams(text):
            for key in owners.get(ngram, set()) if len(owners.get(ngram, set())) <= 10 else ():
                found.setdefault(key, row)
    return found


def test_it_finds_what_a_plain_search_finds_however_the_texts_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    words = [f"w{i}" for i in range(6)]  # few words, so that n-grams meet
    questions = {("task", str(i)): " ".join(draw.choices(words, k=draw.randrange(4, 30))) for i in range(60)}
    texts = [(f"row{i}", " ".join(draw.choices([*words, "other"], k=draw.randrange(1, 200)))) for i in range(400)]
    texts += [("copy", f"so {questions['task', '7']} and {questions['task', '9']}")]
    sizes = []
    for batch in (1, 500, 1 << 18):
        monkeypatch.setattr(contamination, "BATCH_WORDS", batch)
        vocabulary: dict[str, int] = {}
        index = Index(questions, vocabulary)
        found = find_hits({"quiz": index}, vocabulary, texts)["quiz"]
        expected = find_plainly(questions, texts, n=index.n)
        assert {index.keys[item] for item in found} == expected.keys()
        if batch == 1:  # each text by itself: the first row is the first in order
            assert {index.keys[item]: hit.row_id for item, hit in found.items()} == expected
        sizes.append(len(found))
    assert sizes[0] > 3 and all(a == b for a, b in pairwise(sizes))
