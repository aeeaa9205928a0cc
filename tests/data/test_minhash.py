from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_core.data import curate, minhash
from speed_core.files import UserError
from speed_core.profile import Curate

AT = {"threshold": 0.7, "permutations": 128, "shingle": 3}


def definition(texts, threshold, shingle, **_):
    """By brute force: the first earlier text that was kept and whose Jaccard similarity reaches the threshold."""
    grams, kept, out = [minhash.shingles(t, shingle) for t in texts], [], []
    for i, mine in enumerate(grams):
        out.append(next((j for j in kept if minhash.jaccard(mine, grams[j]) >= threshold), -1))
        kept += [i] if out[-1] < 0 else []
    return out


words = st.lists(st.sampled_from(["a", "b", "C", "ß", "naïve", "10", "-", "."]), max_size=14).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(words, max_size=12), st.sampled_from([0.5, 0.7, 0.8]), st.integers(1, 4))
def test_small_sets_give_what_the_definition_gives(texts, threshold, shingle):
    given_ = {"threshold": threshold, "permutations": 256, "shingle": shingle}
    found, grams = minhash.duplicates(texts, **given_).tolist(), [minhash.shingles(t, shingle) for t in texts]
    for i, j in enumerate(found):  # whatever is overlooked, nothing is dropped for no reason
        assert j < 0 or (j < i and found[j] < 0 and minhash.jaccard(grams[i], grams[j]) >= threshold)
    near = [minhash.jaccard(a, b) for a, b in combinations(grams, 2)]
    if not any(threshold <= s < threshold + 0.15 for s in near):  # pairs just above may be overlooked, by design
        assert found == definition(texts, **given_)


def copies(rng, count, replaced):
    """`count` pairs of random texts: (30 words, the same with `replaced` consecutive words exchanged)."""
    for _ in range(count):
        text = rng.integers(0, 10**9, 30)
        copy = text.copy()
        copy[10 : 10 + replaced] = rng.integers(0, 10**9, replaced)
        yield " ".join(map(str, text)), " ".join(map(str, copy))


def test_pairs_above_the_threshold_are_found_and_none_below_is_dropped():
    rng = np.random.default_rng(0)
    # 28 shingles; one exchanged word breaks three (similarity 25/31 = 0.81), two four (0.75), three five (0.697).
    for replaced, least in ((0, 1.0), (1, 1.0), (2, 0.99), (3, 0.0)):
        pairs = list(copies(rng, 1000, replaced))
        found = minhash.duplicates([t for pair in pairs for t in pair], **AT)
        share = np.mean(found[1::2] == np.arange(0, 2000, 2))
        assert (found[::2] == -1).all() and (share == 0 if replaced == 3 else share >= least), (replaced, share)


def test_bands_agree_as_often_as_their_formula_says():
    rng = np.random.default_rng(1)
    pairs = list(copies(rng, 3000, 6))  # similarity 20/36 = 0.556: a band of four agrees with probability 0.095
    left, right = (minhash.band_keys([p[i] for p in pairs], 8, 4, 3, seed=1) for i in (0, 1))
    agree = (left == right).mean()
    assert agree == pytest.approx((20 / 36) ** 4, abs=0.01)
    assert ((left == right).sum(0) > 1).mean() == pytest.approx(minhash.probability(20 / 36, 8, 4), abs=0.04)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("permutations", [64, 128, 256])
def test_a_pair_at_the_threshold_is_found_with_probability_of_at_least_99_percent(threshold, permutations):
    bands, rows = minhash.banding(threshold, permutations)
    assert bands * rows <= permutations and minhash.probability(threshold, bands, rows) >= 0.99
    longer = rows + 1
    assert minhash.probability(threshold, permutations // longer, longer) < 0.99, "longer bands would do"


def test_the_settings_of_the_profile_give_the_bands_that_the_text_states():
    settings_ = Curate()
    assert minhash.banding(settings_.threshold, settings_.permutations) == (32, 4)
    assert minhash.probability(0.7, 32, 4) == pytest.approx(0.998, abs=5e-4)
    assert minhash.probability(0.8, 32, 4) > 0.999998


def test_too_few_permutations_for_a_low_threshold_say_how_many_it_takes():
    with pytest.raises(UserError, match="permutations 16: a threshold of 0.05 needs at least 130"):
        minhash.banding(0.05, 16)
    assert minhash.banding(0.05, 130) == (130, 1)


def test_block_boundaries_and_the_vocabulary_limit_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    texts = [" ".join(rng.choice(list("abcdefgh"), rng.integers(0, 9))) for _ in range(300)]
    whole = minhash.duplicates(texts, **AT)
    monkeypatch.setattr(minhash, "BLOCK", 7)
    monkeypatch.setattr(minhash, "VOCABULARY", 3)
    assert (minhash.duplicates(texts, **AT) == whole).all() and whole.tolist() == definition(texts, **AT)


def test_a_copy_of_a_dropped_text_is_judged_by_the_kept_ones_alone():
    words_ = [f"w{i}" for i in range(40)]
    chain = [" ".join(words_[i : i + 30]) for i in (0, 3, 6)]  # 0.81 to the next, 0.65 over two steps
    assert minhash.duplicates(chain, **AT).tolist() == [-1, 0, -1]


def test_no_texts_no_duplicates():
    assert minhash.duplicates([], **AT).tolist() == []
    assert curate.near_duplicates([], Curate()) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\U0001f600", "\U0001f621"),
        ("==>", "<=="),
        ("How do I learn C++", "How do I learn C#"),
        ("learn C", "learn C++"),
        ("is a < b", "is a > b"),
        ("test x == y", "test x != y"),
        ("&& joins two", "|| joins two"),
        ("!!!", "???"),
        ("a * b", "a / b"),
        ("a-b", "a+b"),
        ("x<y holds", "x>y holds"),
        ("great :)", "great :("),
        ("$100 off", "\u00a3100 off"),
        ("-5 degrees", "5 degrees"),
        ("calculate 20+3", "calculate 20*3"),
        ("(-5) degrees", "(5) degrees"),
        ("\u4eca\u5929\u4e0b\u96e8", "\u660e\u5929\u6709\u98ce"),
    ],
)
def test_texts_that_differ_in_signs_alone_are_no_duplicates(one, other):
    assert minhash.duplicates([one, other], threshold=0.7, permutations=128, shingle=3).tolist() == [-1, -1]
    assert minhash.duplicates([one, one], threshold=0.7, permutations=128, shingle=3).tolist() == [-1, 0]


def test_a_letter_is_the_same_however_its_accent_is_encoded():
    import unicodedata

    from speed_core.data import curate

    one, other = (
        unicodedata.normalize(form, "une tr\u00e8s belle \u00e9t\u00e9 \u00e0 la c\u00f4te de la mer") for form in ("NFC", "NFD")
    )
    assert one != other and minhash.words(one) == minhash.words(other)
    assert minhash.duplicates([one, other], threshold=0.7, permutations=128, shingle=3).tolist() == [-1, 0]
    assert curate.overlaps([{"query": other, "positive": "x", "negative": None}], {"t": [one]}, 8) != [None]
    assert minhash.words("Don't stop, it's 5+ now (yes).") == ["don", "t", "stop", "it", "s", "5", "now", "yes"]
