"""Whether the training data hold a benchmark's items: n-grams of words that both have, and the score without the items that share one.

Words, n and what counts follow GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C): lower case, punctuation and white space left out;
n is the 5th percentile of the items' lengths in words, not below 8, where n-grams meet by chance, and not above 13; one shared n-gram
makes an item a hit. Likewise taken from there: what stands in more than ten places is no content, so an n-gram of more than ten
items of a benchmark (its instructions, its form) makes none of them a hit. An item with fewer than n words cannot be one.

Paraphrases, translations and what the base model has seen are not found: no hit does not mean clean.
"""

import bisect
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.harness.result import BenchmarkResult, ItemKey
from training.config import Config

FEWEST_WORDS, MOST_WORDS = 8, 13
LENGTH_PERCENTILE = 5
MOST_ITEMS = 10
SAMPLES = 5
BATCH_WORDS = 1 << 18  # of training text held at once
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it vanishes modulo 2^64
UNKNOWN = -1  # a word of no item, or the end of a text
WORD = re.compile(r"\w+")

Text = tuple[str, str]  # row id, text


class Hit(Config):
    """An item whose n-gram stands in a training row, the first one found."""

    task: str
    doc_id: str
    ngram: str
    row_id: str


class Level(Config):
    """A mean score over items, with its standard error; None where a single item has none."""

    items: int
    value: float
    stderr: float | None


class Contamination(Config):
    """What of one benchmark the training rows hold, and the scores with and without it: of the challenger, the model that was trained
    on them, and of the champion where there is one."""

    benchmark: str
    n: int  # words of an n-gram
    items: int
    short: int  # items with fewer than n words, of which nothing can be said
    hits: int
    challenger: Level
    champion: Level | None
    challenger_clean: Level | None  # without the hits; None where nothing is left
    champion_clean: Level | None
    samples: tuple[Hit, ...]

    @property
    def share(self) -> float:
        """Share of the items that are hits."""
        return self.hits / self.items


class Index:
    """The n-grams of one benchmark's items as sorted hashes, each beside the item that it is of.

    I items, G n-grams of items (a shared one once for each item), W words of a text
    """

    def __init__(self, questions: Mapping[ItemKey, str], vocabulary: dict[str, int]) -> None:
        self.keys = list(questions)
        words = [split_words(questions[key]) for key in self.keys]
        self.n = choose_n([len(some) for some in words])
        self.short = sum(len(some) < self.n for some in words)
        self.ids = [
            np.array([vocabulary.setdefault(word, len(vocabulary)) for word in some], dtype=np.int64) for some in words
        ]
        hash_G = [np.unique(hash_ngrams(ids_W, n=self.n)) for ids_W in self.ids]
        counts: Counter[int] = Counter()
        for some in hash_G:
            counts.update(some.tolist())
        common = np.array(sorted(value for value, count in counts.items() if count > MOST_ITEMS), dtype=np.uint64)
        hash_G = [some[~np.isin(some, common)] for some in hash_G]
        self.hash_G = np.concatenate([*hash_G, np.empty(0, dtype=np.uint64)])
        self.item_G = np.repeat(np.arange(len(hash_G)), [len(some) for some in hash_G])
        order = np.argsort(self.hash_G, kind="stable")
        self.hash_G, self.item_G = self.hash_G[order], self.item_G[order]

    def find(self, ids_W: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Yield (item, place of an n-gram of it) in the order of places, each n-gram once; equal hashes are looked at word for word."""
        hash_W = hash_ngrams(ids_W, n=self.n)
        places = np.flatnonzero(~has_unknown(ids_W, n=self.n))
        low, high = (np.searchsorted(self.hash_G, hash_W[places], side) for side in ("left", "right"))
        places, low, high = places[low < high], low[low < high], high[low < high]
        _, first = np.unique(hash_W[places], return_index=True)
        for at in sorted(first.tolist()):
            place = int(places[at])
            ngram = ids_W[place : place + self.n]
            for item in self.item_G[low[at] : high[at]].tolist():
                windows = np.lib.stride_tricks.sliding_window_view(self.ids[item], self.n)
                if (windows == ngram).all(axis=1).any():
                    yield item, place

    def forget(self, items: Iterable[int]) -> None:
        """Look for these items no more."""
        kept = ~np.isin(self.item_G, list(items))
        self.hash_G, self.item_G = self.hash_G[kept], self.item_G[kept]


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def choose_n(lengths: Sequence[int]) -> int:
    """Return how many words make an n-gram of a benchmark whose items have so many words."""
    return min(MOST_WORDS, max(FEWEST_WORDS, int(np.percentile(lengths, LENGTH_PERCENTILE))))


def hash_ngrams(ids_W: NDArray[np.int64], *, n: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of the n words from each place of a text, (W - n + 1,); none where it is shorter."""
    places = max(0, len(ids_W) - n + 1)
    hash_W = np.zeros(places, dtype=np.uint64)
    unsigned_W = ids_W.astype(np.uint64)
    for offset in range(n if places else 0):
        hash_W = hash_W * BASE + unsigned_W[offset : offset + places] + np.uint64(1)
    return hash_W


def has_unknown(ids_W: NDArray[np.int64], *, n: int) -> NDArray[np.bool_]:
    """Return for each place whether any of its n words is in no item, (W - n + 1,)."""
    sums = np.concatenate([[0], np.cumsum(ids_W == UNKNOWN)])
    places = max(0, len(ids_W) - n + 1)
    return np.asarray(sums[n : n + places] > sums[:places])


def measure_contamination(
    challenger: Sequence[BenchmarkResult], champion: Sequence[BenchmarkResult] | None, texts: Iterable[Text]
) -> list[Contamination]:
    """Return what of each benchmark the training texts hold. They are read once; memory does not grow with their number.

    Benchmarks whose items are not the same for both models, which the gate refuses to compare, are left out.
    """
    others = {result.benchmark: result for result in champion or ()}
    if champion is not None:
        challenger = [
            one
            for one in challenger
            if one.benchmark in others and others[one.benchmark].items.keys() == one.items.keys()
        ]
    vocabulary: dict[str, int] = {}
    indices = {result.benchmark: Index(result.questions, vocabulary) for result in challenger}
    hits = find_hits(indices, vocabulary, texts)
    return [
        compare_levels(result, others.get(result.benchmark), indices[result.benchmark], hits[result.benchmark])
        for result in challenger
    ]


def find_hits(
    indices: Mapping[str, Index], vocabulary: Mapping[str, int], texts: Iterable[Text]
) -> dict[str, dict[int, Hit]]:
    """Return the hits of each benchmark by item, each with the first n-gram found."""
    hits: dict[str, dict[int, Hit]] = {name: {} for name in indices}
    for words, ends, rows in batch_words(texts):
        ids_W = np.fromiter((vocabulary.get(word, UNKNOWN) for word in words), dtype=np.int64, count=len(words))
        for name, index in indices.items():
            found = hits[name]
            for item, place in index.find(ids_W):
                if item not in found:
                    task, doc_id = index.keys[item]
                    ngram = " ".join(words[place : place + index.n])
                    row_id = rows[bisect.bisect_right(ends, place)]
                    found[item] = Hit(task=task, doc_id=doc_id, ngram=ngram, row_id=row_id)
            if found:
                index.forget(found)
    return hits


def batch_words(texts: Iterable[Text]) -> Iterator[tuple[list[str], list[int], list[str]]]:
    """Yield (words of several texts, an empty one after each; the place of each text's end; its row)."""
    words: list[str] = []
    ends: list[int] = []
    rows: list[str] = []
    for row_id, text in texts:
        words += [*split_words(text), ""]
        ends.append(len(words))
        rows.append(row_id)
        if len(words) >= BATCH_WORDS:
            yield words, ends, rows
            words, ends, rows = [], [], []
    yield words, ends, rows


def compare_levels(
    challenger: BenchmarkResult, champion: BenchmarkResult | None, index: Index, hits: Mapping[int, Hit]
) -> Contamination:
    """Return a benchmark's hits with the models' scores over all items and over those that are no hits."""
    clean = sorted(challenger.items.keys() - {index.keys[item] for item in hits})
    return Contamination(
        benchmark=challenger.benchmark,
        n=index.n,
        items=len(challenger.items),
        short=index.short,
        hits=len(hits),
        challenger=average(list(challenger.items.values())),
        champion=average(list(champion.items.values())) if champion else None,
        challenger_clean=average([challenger.items[key] for key in clean]) if clean else None,
        champion_clean=average([champion.items[key] for key in clean]) if champion and clean else None,
        samples=tuple(hits[item] for item in sorted(hits)[:SAMPLES]),
    )


def average(scores: Sequence[float]) -> Level:
    """Return the mean and its standard error, sd / sqrt(n) with n - 1 in the variance, as lm-eval gives it."""
    stderr = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return Level(items=len(scores), value=math.fsum(scores) / len(scores), stderr=stderr)


def flag_contamination(found: Contamination) -> list[str]:
    """Return what a reader should know before believing a benchmark whose items stand in the training data."""
    if not found.hits:
        return []
    first = found.samples[0]
    clean = found.challenger_clean
    without = f"without them {show(clean)} on {clean.items}" if clean else "no item is left without them"
    return [
        f"{found.benchmark}: {found.hits} of {found.items} items ({found.share:.1%}) share {found.n} words in a row with the training data "
        f"(first: {first.task}, document {first.doc_id}, in row {first.row_id[:12]}: {first.ngram!r}); the {'challenger' if found.champion else 'model'} scores "
        f"{show(found.challenger)} points on all, {without}"
    ]


def show(level: Level) -> str:
    """Return a score in points of 100 with its standard error."""
    return f"{100 * level.value:.1f}" + (f" ± {100 * level.stderr:.1f}" if level.stderr is not None else "")
