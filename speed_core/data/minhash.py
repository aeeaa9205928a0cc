"""Near-duplicate texts at scale: MinHash signatures in numpy, bands, candidates confirmed on the texts themselves.

A pair of texts is compared by the Jaccard similarity of their word shingles. MinHash finds the candidate pairs
(Broder 1997; bands: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4); the decision is always
the exact similarity, so hashing can overlook a pair but never makes one up.

This is our own code because a million records have to fit into 2 GB of memory: of the libraries that we measured
(`benchmarks/dedup.py`), the smallest takes 3.4 GB.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, count, pairwise

import numpy as np

from speed_core.files import UserError

BLOCK = 2048  # texts hashed at a time: the arrays of a block stay in the processor's cache
VOCABULARY = 1 << 20  # word hashes remembered; beyond that the memory is emptied, not grown
FOUND = 0.99  # least probability with which a pair at the threshold becomes a candidate


# One character of a script without spaces; a word, with the signs that tell C++, C# and C apart; an operator that stands alone, between
# single letters or before a number (a/b, x<10); a minus or a currency before a number; a smile; or one sign that is no punctuation (an emoji).
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Japanese and Chinese
WORD = re.compile(
    rf"""[{CJK}]|(?:(?![{CJK}])\w)+(?:(?<=[^\W\d_])(?:\+\+|[+#](?![\w+#])))?
    | (?<!\S)(?:[<>=!|^~%$+*/\u00a3]{{1,3}}|&&|[:;]-?[()|])(?!\S) | (?<=\b\w\ )-(?=\ (?:\d+|\w)\b)
    | (?<=\b\w)[<>=*/+-](?=\w\b) | (?<=\w)[<>=*/+](?=\d) | (?<![^\s(])-(?=\d) | [$\u00a2-\u00a5](?=\d)
    | [^\w\s\u0000-\u02ff\u2000-\u206f]""",
    re.VERBOSE,
)


def words(text: str) -> list[str]:
    """Words of lower-cased text. Equal letters are equal however they are encoded (NFC); a text without words has its signs."""
    plain = unicodedata.normalize("NFC", text).lower()
    return WORD.findall(plain) or [c for c in plain if not c.isspace()]


def shingles(text: str, size: int) -> set[str]:
    """Word n-grams of lower-cased text (the words themselves when the text is shorter)."""
    found = words(text)
    return {" ".join(found[i : i + size]) for i in range(len(found) - size + 1)} or set(found)


def jaccard(a: set[str], b: set[str]) -> float:
    """Shared shingles over all shingles; two empty sets are equal."""
    return len(a & b) / len(a | b) if a or b else 1.0


def probability(similarity: float, bands: int, rows: int) -> float:
    """Probability that two texts of this Jaccard similarity s become a candidate: that at least two bands agree.

    A band agrees with p = s^rows, so 1 - (1 - p)^bands - bands p (1 - p)^(bands - 1). One band would find a little
    more, but two let through far fewer of the many pairs that only share a phrase: at 32 bands of 4 and s = 0.22,
    0.3 % instead of 7 %, and comparing those takes most of the time where texts follow templates.
    """
    p = similarity**rows
    return 1 - (1 - p) ** bands - bands * p * (1 - p) ** (bands - 1)


def banding(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows per band): the longest bands with which a pair at the threshold is found with probability >= 0.99.

    Every band that the permutations allow is used: 0.7 and 128 give 32 bands of 4, which find a pair at 0.7 with
    probability 0.998, one at 0.8 with 0.999999. Raises UserError where even bands of one row are too few.
    """
    for rows in range(permutations, 0, -1):
        if probability(threshold, permutations // rows, rows) >= FOUND:
            return permutations // rows, rows
    least = next(n for n in count(permutations) if probability(threshold, n, 1) >= FOUND)
    raise UserError(f"curate.permutations {permutations}: a threshold of {threshold} needs at least {least}; raise either")


def duplicates(texts: Sequence[str], *, threshold: float, permutations: int, shingle: int, seed: int = 1) -> np.ndarray:
    """(n,) position of the first kept text that this one nearly repeats, or -1 where it is kept.

    In order, a text is a duplicate when its Jaccard similarity to an earlier text that was kept is at least
    `threshold`; a repetition of a text that was itself dropped does not count. See `banding` for what may be
    overlooked. Deterministic. Memory beyond the texts: 8 bytes a band and text (256 MB per million at 32 bands).
    """
    bands, rows = banding(threshold, permutations)
    out = np.full(len(texts), -1, np.int64)
    if not texts:
        return out
    shingles_of = lru_cache(maxsize=1 << 14)(lambda i: shingles(texts[i], shingle))
    kept: dict[int, list[int]] = {}  # bucket -> kept texts in it, in order
    positions, buckets = shared_buckets(band_keys(texts, bands, rows, shingle, seed))
    edges = np.flatnonzero(np.diff(positions, prepend=-1, append=-1)).tolist()
    for start, end in pairwise(edges):
        i, mine = int(positions[start]), buckets[start:end].tolist()
        bands_shared = Counter(chain.from_iterable(kept.get(b, ()) for b in mine))
        candidates = sorted(c for c, shared in bands_shared.items() if shared > 1)
        twin = next((c for c in candidates if jaccard(shingles_of(i), shingles_of(c)) >= threshold), None)
        if twin is not None:
            out[i] = twin
            continue
        for b in mine:
            kept.setdefault(b, []).append(i)
    return out


def shared_buckets(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions, buckets): a pair for each band in which a text shares its key with another one, by position.

    keys: (bands, n). A bucket is one key of one band.
    """
    positions, buckets, total = [], [], 0
    for band in keys:
        _, bucket, size = np.unique(band, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(size[bucket] > 1)
        positions.append(shared.astype(np.int32))
        buckets.append((total + bucket[shared]).astype(np.int32))
        total += len(size)
    where = np.concatenate(positions)
    order = np.argsort(where, kind="stable")
    return where[order], np.concatenate(buckets)[order]


def band_keys(texts: Sequence[str], bands: int, rows: int, shingle: int, seed: int) -> np.ndarray:
    """(bands, n) uint64: MinHash signatures, a key for each band; equal when all `rows` minima of the band are equal.

    The hash of a shingle x is (a x + b mod 2^64) / 2^32 with random a and b, strongly universal for 32-bit x
    (Dietzfelbinger 1996): x is the upper half of a mixed 64-bit hash of the words.
    """
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 1 << 64, (2, bands * rows), np.uint64, endpoint=False)
    known, out = WordHashes(), np.zeros((bands, len(texts)), np.uint64)
    for begin in range(0, len(texts), BLOCK):
        hashes, lengths = shingle_hashes(texts[begin : begin + BLOCK], shingle, known)
        x, filled = hashes >> np.uint64(32), np.flatnonzero(lengths)
        starts = (np.cumsum(lengths) - lengths)[filled]
        for p in range(bands * rows if len(filled) else 0):
            least = np.minimum.reduceat(a[p] * x + b[p], starts) >> np.uint64(32)
            key = out[p // rows, begin : begin + BLOCK]
            key[filled] = mix(key[filled] ^ (least + np.uint64(1)))
    return out


class WordHashes(dict[str, int]):
    """64-bit hashes of words, the same in every process (Python's own hash of a string is not)."""

    def __missing__(self, word: str) -> int:
        if len(self) >= VOCABULARY:
            self.clear()
        self[word] = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        return self[word]


def shingle_hashes(texts: Sequence[str], size: int, known: WordHashes) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of all shingles one text after the other, number of each text's); repeated shingles stay repeated."""
    split = [words(t) for t in texts]
    counts = np.fromiter(map(len, split), np.int64, len(split))
    total = int(counts.sum())
    flat = np.fromiter(map(known.__getitem__, chain.from_iterable(split)), np.uint64, total)
    # A polynomial of the hashes of `size` words from each position on; it runs past a text's end where it is not used.
    run, padded = flat.copy(), np.concatenate([flat, np.zeros(size, np.uint64)])
    for k in range(1, size):
        run = run * np.uint64(0x9E3779B97F4A7C15) + padded[k : k + total]
    left = np.repeat(np.cumsum(counts), counts) - np.arange(total)  # words from a position to the end of its text
    short = counts < size
    # A shorter text's words are no shingles of a longer one: unless size is 1 they get hashes of their own.
    in_short = np.repeat(short, counts)
    hashes = mix(np.where(in_short, ~flat, run))[in_short | (left >= size)]
    return hashes, np.where(short, counts, counts - size + 1)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words in which every input bit moves every output bit (splitmix64's last step)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
