import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speed_core.contrastive import guided_loss
from speed_core.contrastive.guide_cache import GuideCache, GuidedCollator, encoder_digest
from speed_core.contrastive.guided_loss import false_negative_mask, guided_contrastive_loss, unguided_contrastive_loss
from speed_core.contrastive.loss_inputs import LossSettings, unit_rows
from speed_core.contrastive.sentence_transformers_loss import CachedGuidedContrastiveLoss, GuidedContrastiveLoss
from speed_core.files import UserError

WORDS = "a b c d e f g h red blue green cat dog bird runs sleeps eats who what where is the on under tree house".split()


def oracle(a, p, n, ga, gp, gn, tau, margin=0.0, strategy="absolute", aa=True, pp=True, ids=None, rows=None, slack=1e-6):
    """GISTEmbed's loss written as loops; no guide (ga None) removes diagonals and equal texts only.

    `ids` are lists of integers of anchors, positives and negatives; `rows` as in `guided_contrastive_loss`. `slack`: how much
    above the threshold is a tie, which rounding decides.
    """
    unit = lambda t: None if t is None else F.normalize(t.reshape(-1, t.shape[-1]), dim=-1)  # noqa: E731
    a, p, n, ga, gp, gn = (unit(t) for t in (a, p, n, ga, gp, gn))
    total = 0.0
    start, stop = rows or (0, len(a))
    for i in range(start, stop):
        own = None if ga is None else ga[i] @ gp[i]
        t = None if own is None else own - margin if strategy == "absolute" else own - own.abs() * margin

        def kept(x, y, column, j, i=i, t=t):
            if ids is not None and ids[column][j] in (ids[0][i], ids[1][i]):
                return False
            return t is None or x @ y[j] <= t + slack

        g = lambda side, k: None if side is None else side[k]  # noqa: E731
        logits = [a[i] @ p[i]]
        logits += [a[i] @ p[j] for j in range(len(p)) if j != i and kept(g(ga, i), gp, 1, j)]
        logits += [p[i] @ p[j] for j in range(len(p)) if pp and j != i and kept(g(gp, i), gp, 1, j)]
        logits += [a[i] @ a[j] for j in range(len(a)) if aa and j != i and kept(g(ga, i), ga, 0, j)]
        logits += [a[i] @ n[j] for j in range(0 if n is None else len(n)) if kept(g(ga, i), gn, 2, j)]
        total = total + torch.logsumexp(torch.stack(logits) / tau, 0) - logits[0] / tau
    return total / (stop - start)


def draw(seed, b, d, k):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return make(b, d), make(b, d), make(b, k, d) if k else None, make(b, 3), make(b, 3), make(b, k, 3) if k else None


def call(a, p, n, ga, gp, gn, *, text_ids=None, rows=None, **settings):
    return guided_contrastive_loss((a, p, n), (ga, gp, gn), LossSettings(**settings), text_ids=text_ids, rows=rows)


def two_rows_at_a_time(patch):
    patch.setattr(guided_loss, "block_rows", lambda embeddings, width: 2)


# --- the function -------------------------------------------------------------------------------


@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 3),
    st.sampled_from([-0.3, 0.0, 0.2]),
    st.sampled_from(["absolute", "relative"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@example(436, 3, 1, 2, 0, -0.3, "absolute", True, False, True, False)  # a candidate 0.0000003 above the threshold
@settings(max_examples=100, deadline=None)
def test_value_and_gradient_equal_the_loops(seed, b, before, after, k, margin, strategy, aa, pp, guided, with_ids):
    a, p, n, ga, gp, gn = draw(seed, before + b + after, 5, k)  # rows of other processes before and after ours
    ids, rows = None, (before, before + b)
    if with_ids:  # few different texts, so that many are equal
        texts = torch.Generator().manual_seed(seed)
        ids = [torch.randint(8, shape, generator=texts) for shape in ((len(a),), (len(p),), (len(p), k))]
    inputs = [t.requires_grad_() for t in (a, p, n) if t is not None]
    how = {"temperature": 0.2, "contrast_anchors": aa, "contrast_positives": pp}
    more = {"rows": rows, "text_ids": ids if ids is None or k else ids[:2]}
    loops = {"slack": 1e-12, "aa": aa, "pp": pp, "rows": rows, "ids": ids and [t.flatten().tolist() for t in ids]}
    with pytest.MonkeyPatch.context() as patch:
        two_rows_at_a_time(patch)
        if guided:
            wanted = oracle(a, p, n, ga, gp, gn, 0.2, margin, strategy, **loops)
            ours = call(a, p, n, ga, gp, gn, margin=margin, margin_strategy=strategy, **how, **more)
        else:
            wanted = oracle(a, p, n, None, None, None, 0.2, **loops)
            ours = unguided_contrastive_loss((a, p, n), LossSettings(**how), **more)
    reference = torch.autograd.grad(wanted, inputs, allow_unused=True)
    assert torch.allclose(ours, wanted, atol=1e-8)
    for x, y in zip(torch.autograd.grad(ours, inputs), reference, strict=True):
        assert torch.allclose(x, torch.zeros_like(x) if y is None else y, atol=1e-8)


@pytest.mark.parametrize("k", (0, 2))
def test_gradcheck_passes_for_some_rows_and_with_text_ids(k, monkeypatch):
    a, p, n, ga, gp, gn = draw(1, 5, 4, k)
    ids = (torch.arange(5), torch.tensor([9, 1, 9, 7, 8]), torch.arange(20, 20 + 5 * k).view(5, k) if k else None)
    two_rows_at_a_time(monkeypatch)

    def f(a, p, *n):
        return call(a, p, n[0] if n else None, ga, gp, gn, text_ids=ids, rows=(2, 5), temperature=0.3)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (a, p, n) if t is not None])


def test_a_second_derivative_is_refused_not_wrong():
    a, p, *_ = draw(0, 3, 4, 0)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(unguided_contrastive_loss((a.requires_grad_(), p)), a, create_graph=True)


@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
    st.sampled_from([-1.0, 0.0, 0.1, 5.0]),
    st.sampled_from(["absolute", "relative"]),
)
@settings(max_examples=60, deadline=None)
def test_never_nan_with_zero_rows_duplicates_low_precision_and_any_margin(seed, b, dtype, zero, margin, strategy):
    a, p, n, ga, gp, gn = (t.to(dtype) for t in draw(seed, b, 5, 2))
    p[-1], gp[-1] = p[0], gp[0]
    gp[0] = -ga[0]  # an own pair with a negative similarity
    if zero:
        a[0], p[0], n[0], ga[0] = 0, 0, 0, 0
    inputs = [t.requires_grad_() for t in (a, p, n)]
    loss = call(*inputs, ga, gp, gn, margin=margin, margin_strategy=strategy)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and loss >= 0
    assert all(torch.isfinite(t.grad).all() for t in inputs)
    # The loops always count the own positive and never the own query or positive once more.
    wanted = oracle(*(t.detach().double() for t in (a, p, n, ga, gp, gn)), 0.01, margin, strategy)
    assert torch.allclose(loss.double(), wanted, rtol=1e-4, atol=1e-3)


EXTREMES = [
    (torch.float16, 65504.0), (torch.float16, 6e-8), (torch.bfloat16, 3e38), (torch.bfloat16, 1e-38),
    (torch.float32, 3e38), (torch.float32, 1e20), (torch.float32, 1e-30), (torch.float32, 1e-42),
    (torch.float64, 1e300), (torch.float64, 1e-310),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "size"), EXTREMES)
def test_the_length_of_a_row_does_not_matter_up_to_the_ends_of_its_type(dtype, size):
    ordinary = [t.sign() for t in draw(4, 4, 6, 1)]
    extreme = [(t * size).to(dtype).requires_grad_() for t in ordinary]
    loss = call(*extreme, temperature=0.1)
    plain = [t.to(loss.dtype).requires_grad_() for t in ordinary]
    wanted = call(*plain, temperature=0.1)
    assert torch.allclose(loss, wanted, rtol=1e-5) and loss > 0.1
    loss.backward()
    wanted.backward()
    for x, y in zip(extreme[:3], plain[:3], strict=True):
        assert not x.grad.isnan().any()
        if 1e-30 <= size < 1e38 and dtype in (torch.float32, torch.float64):
            assert torch.allclose(x.grad * size, y.grad, rtol=1e-4, atol=1e-6) and y.grad.abs().max() > 0.01


def test_extreme_guide_rows_of_another_type_are_no_zero_rows_either():
    a, p, n, ga, gp, gn = draw(4, 4, 6, 1)
    wanted = call(*(t.float() for t in (a, p, n)), ga, gp, gn)
    assert torch.allclose(call(*(t.float() for t in (a, p, n)), ga * 1e200, gp * 1e-200, gn * 1e30), wanted, rtol=1e-5)


def test_ordinary_rows_keep_their_values_to_the_last_bit():
    x = torch.randn(64, 384, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    assert torch.equal(unit_rows(x, "x", torch.float32), F.normalize(x, dim=1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("size", (1e-3, 1.0, 1e3))
def test_rows_beside_an_extreme_one_have_the_bits_they_have_alone(dtype, size):
    x, up = torch.randn(2, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    alone = (size * x).to(dtype).requires_grad_()
    beside = torch.cat([alone.detach(), torch.zeros(1, 24, dtype=dtype), torch.full((1, 24), 1e30, dtype=dtype)]).requires_grad_()
    of_alone, of_beside = (unit_rows(t, "x", wide) for t in (alone, beside))
    of_alone.backward(up.to(wide))
    of_beside.backward(torch.cat([up, up[:2]]).to(wide))
    assert torch.equal(of_alone, of_beside[:16]) and torch.equal(alone.grad, beside.grad[:16])


def test_a_gradient_that_float16_cannot_hold_is_infinite_and_neither_nan_nor_cut():
    x, y = (1e-4 * torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))).half()
    wide = [t.float().requires_grad_() for t in (x, y)]
    half = [x.requires_grad_(), y.requires_grad_()]
    for pair in (wide, half):
        unguided_contrastive_loss(pair).backward()
    for t, w in zip(half, wide, strict=True):
        assert torch.equal(t.grad, w.grad.half()) and torch.isfinite(w.grad).all()
    assert half[0].grad.isinf().any(), "GradScaler sees an inf and skips the step"


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_the_block_size_changes_nothing(seed, b, size):
    tensors = draw(seed, b, 4, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guided_loss, "block_rows", lambda embeddings, width: size)
        in_blocks = call(*tensors)
    assert torch.allclose(in_blocks, call(*tensors), rtol=1e-12)


def test_a_duplicate_of_the_own_positive_is_not_removed_by_rounding():
    torch.manual_seed(0)
    for size in (8, 384, 4096):
        ga, gp = torch.randn(64, size), torch.randn(64, size)
        gp[1::2] = gp[::2]
        duplicates = torch.arange(64) ^ 1
        assert not false_negative_mask((ga, gp)).removed["ap"][torch.arange(64), duplicates].any()


def test_the_protected_positive_survives_any_margin():
    tensors = draw(3, 4, 5, 1)
    assert call(*tensors, margin=5.0) < 1e-9, "with every negative removed the loss is zero"
    assert torch.isfinite(call(*tensors, margin=-5.0)), "with nothing removed but the diagonals"


def test_a_relative_margin_lowers_the_threshold_of_a_negative_similarity_too():
    ga, gp = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-0.6, 0.8], [0.8, -0.6]])
    view = false_negative_mask((ga, gp), LossSettings(margin=0.5, margin_strategy="relative"))
    assert torch.allclose(view.threshold, torch.tensor([-0.9, -0.9]))


def test_query_equal_to_positive_can_reach_zero():
    x = torch.eye(4)
    assert guided_contrastive_loss((x, x), (x, x)) < 1e-6


@pytest.mark.parametrize("guided", (True, False))
def test_texts_with_the_same_id_are_no_negatives(guided):
    x, y = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(3, 8), dim=1)
    ids = (torch.tensor([0, 1, 2]), torch.tensor([3, 1, 3]), [torch.tensor([2, 0, 5])])
    settings = LossSettings(0.1, contrast_anchors=False, contrast_positives=False)
    columns = [(x, y, [y]), *([(x, x, [x])] if guided else [])]  # t = 1: the guide keeps all
    ours = (guided_contrastive_loss if guided else unguided_contrastive_loss)(*columns, settings, text_ids=ids)
    logits = (torch.cat([x @ y.T, x @ y.T], 1)) / 0.1
    for i, j in ((0, 2), (2, 0), (0, 4), (2, 3)):  # 0 and 2 share a positive; negatives 1 and 0 are anchors 0 and 2
        logits[i, j] = float("-inf")
    assert torch.allclose(ours, F.cross_entropy(logits, torch.arange(3)), atol=1e-5)


def test_the_losses_of_two_processes_add_up_to_that_of_the_whole_batch():
    a, p, n, ga, gp, gn = draw(5, 6, 4, 2)
    leaves = [t.requires_grad_() for t in (a, p, n)]
    whole, *parts = (
        (r[1] - r[0]) * call(a, p, n, ga, gp, gn, temperature=0.2, margin=0.1, rows=r) for r in ((0, 6), (0, 2), (2, 6))
    )
    assert torch.allclose(whole, sum(parts), atol=1e-9) and whole > 0.01
    for x, y in zip(*(torch.autograd.grad(value, leaves) for value in (whole, sum(parts))), strict=True):
        assert torch.allclose(x, y, atol=1e-9) and x.abs().max() > 0.01


def test_autocast_changes_neither_value_nor_gradient():
    a, p, n, ga, gp, gn = (t.float() for t in draw(5, 32, 16, 1))
    a.requires_grad_()
    plain = call(a, p, n, ga, gp, gn)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = call(a, p, n, ga, gp, gn)
    assert torch.equal(plain, mixed)
    assert torch.equal(*(torch.autograd.grad(x, a)[0] for x in (plain, mixed)))


def test_the_mask_view_shows_blocks_similarities_and_thresholds():
    _, _, _, ga, gp, gn = draw(7, 5, 4, 2)
    view = false_negative_mask((ga, gp, gn), LossSettings(margin=0.1))
    unit = [F.normalize(t.reshape(-1, 3), dim=1) for t in (ga, gp, gn)]
    assert torch.allclose(view.threshold, (unit[0] * unit[1]).sum(1) - 0.1)
    assert torch.allclose(view.similarity["an"], unit[0] @ unit[2].T)
    assert torch.equal(view.removed["an"], view.similarity["an"] > view.threshold[:, None])
    shapes = {k: tuple(v.shape) for k, v in view.removed.items()}
    assert shapes == {"ap": (5, 5), "an": (5, 10), "aa": (5, 5), "pp": (5, 5)}


BAD = [
    ({"positives": torch.ones(2, 4)}, r"positives: shape \(2, 4\), but anchors \(3, 4\).*needs its own positive"),
    ({"positives": torch.ones(3, 5)}, r"positives: shape \(3, 5\), but anchors \(3, 4\)"),
    ({"negatives": torch.ones(2, 4)}, r"negatives: shape \(2, 4\).*expected \(3, 4\)"),
    ({"negatives": [torch.ones(3, 4), torch.ones(3, 5)]}, r"negatives: shape .*\(3, 5\)"),
    ({"negatives": torch.ones(3, 4)}, r"guide_negatives: shape none, but negatives \(3, 4\); encode the same texts"),
    ({"guide_negatives": torch.ones(3, 4)}, r"guide_negatives: shape \(3, 4\), but negatives none"),
    ({"guide_positives": None}, "guide_positives: None; encode .* or call unguided_contrastive_loss"),
    ({"guide_anchors": None}, "guide_anchors: None"),
    ({"guide_anchors": torch.ones(2, 4)}, r"guide_anchors: shape \(2, 4\), but anchors \(3, 4\); encode the same texts"),
    ({"guide_positives": torch.ones(4, 2), "guide_anchors": torch.ones(3, 2)}, r"guide_positives: shape \(4, 2\), but positives"),
    ({"guide_positives": torch.ones(3, 5)}, r"guide_positives: shape \(3, 5\), but guide_anchors \(3, 4\)"),
    ({"text_ids": (torch.arange(3), torch.arange(2), None)}, r"text_ids\[1\]: shape \(2,\), but positives \(3, 4\); give one"),
    (
        {"text_ids": (torch.ones(3, 1), torch.arange(3))},
        r"text_ids\[0\]: shape \(3, 1\), but anchors \(3, 4\); give one integer id",
    ),
    ({"text_ids": (torch.arange(3), torch.arange(3), torch.arange(3))}, r"text_ids\[2\]: shape \(3,\), but negatives none"),
    ({"text_ids": (torch.arange(3),)}, "text_ids: 1 parts; give ids of anchors, positives"),
    (
        {"negatives": [torch.ones(3, 4), torch.ones(5, 4)]},
        r"negatives: shape \(3, 4\), \(5, 4\), expected \(3, 4\) or K of them",
    ),
    ({"anchors": torch.ones(0, 4), "positives": torch.ones(0, 4)}, r"shape \(0, 4\).*give at least one pair"),
    ({"anchors": torch.ones(3, 0), "positives": torch.ones(3, 0)}, "give at least one pair"),
    (
        {"negatives": torch.ones(3, 4), "guide_negatives": torch.ones(3, 2, 4)},
        r"guide_negatives: shape \(3, 2, 4\), but negatives \(3, 4\)",
    ),
    (
        {"negatives": torch.ones(3, 2, 4).index_fill(1, torch.tensor(1), math.nan)},
        r"negatives: row 0, negative 1 of shape \(3, 2, 4\)",
    ),
    ({"negatives": [torch.ones(3, 4), torch.full((3, 4), math.inf)]}, "negatives: row 0, negative 1 of shape"),
    ({"negatives": torch.ones(3, 4).index_fill(0, torch.tensor(2), math.nan)}, r"negatives: row 2 of shape \(3, 4\)"),
    ({"anchors": torch.full((3, 4), float("nan"))}, "anchors: row 0 of shape .* not finite"),
    ({"guide_positives": torch.full((3, 4), float("inf"))}, "guide_positives: row 0 .* not finite"),
    ({"margin_strategy": "other"}, "margin_strategy 'other'"),
    ({"temperature": 0.0}, "temperature 0.0"),
    ({"margin": float("nan")}, "margin nan"),
    ({"rows": (2, 4)}, "rows"),
]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_bad_input_gets_one_line_that_names_the_argument(change, says):
    values = {k: torch.ones(3, 4) for k in ("anchors", "positives", "guide_anchors", "guide_positives")} | change
    columns = [values.pop(f"{who}{name}", None) for who in ("", "guide_") for name in ("anchors", "positives", "negatives")]
    with pytest.raises(UserError, match=says) as caught:
        call(*columns, **values)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


def test_a_forgotten_guide_is_an_error_and_not_the_unguided_loss():
    with pytest.raises(TypeError, match="guide"):
        guided_contrastive_loss((torch.eye(3), torch.eye(3)))
    with pytest.raises(UserError, match="guide_anchors: None"):
        guided_contrastive_loss((torch.eye(3), torch.eye(3)), None, LossSettings(margin=0.1))


def test_ids_of_pairs_need_no_third_part():
    a, p, _, ga, gp, _ = draw(2, 4, 5, 0)
    ids = torch.tensor([0, 1, 2, 0]), torch.tensor([4, 5, 4, 6])
    values = [call(a, p, None, ga, gp, None, temperature=1.0, text_ids=x) for x in (ids, (*ids, None), (*ids, []))]
    assert values[0] == values[1] == values[2] and values[0] < call(a, p, None, ga, gp, None, temperature=1.0)


def test_a_margin_without_a_guide_is_refused():
    with pytest.raises(ValueError, match="margin.*without a guide"):
        unguided_contrastive_loss((torch.ones(2, 3), torch.ones(2, 3)), LossSettings(margin=0.1))


# --- sentence-transformers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """seed, width, length limit -> a random two-layer BERT with a word tokenizer; nothing is downloaded."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ":", "query"]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))

    def make(seed, width=16, limit=64):
        torch.manual_seed(seed)
        size = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=len(tokenizer), **size, max_position_embeddings=128, initializer_range=0.5)
        path = folder / f"{seed}-{width}"
        BertModel(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return SentenceTransformer(modules=[Transformer(str(path), max_seq_length=limit), Pooling(width)], device="cpu")

    return make


def texts(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    names = ["anchor", "positive", "negative", "negative_2"][:columns]
    return [{k: " ".join(rng.choice(WORDS, rng.integers(3, 9))) for k in names} for _ in range(rows)]


def features(model, rows, prompts=None, **collator):
    """What the trainer hands to a loss for these rows, by the trainer's own code."""
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    batch = GuidedCollator(SentenceTransformerDataCollator(model.preprocess, prompts=prompts), **collator)(rows)
    return SentenceTransformerTrainer.collect_features(None, batch)[0]


def value_and_gradients(loss, model, inputs):
    model.zero_grad()
    value = loss([dict(f) for f in inputs], None)
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def bare(inputs):
    return [{k: v for k, v in f.items() if k not in ("text_id", "guide_text", "guide_embedding")} for f in inputs]


@pytest.mark.parametrize("columns", (2, 3, 4))
@pytest.mark.parametrize(
    ("margin", "strategy", "switches"),
    [
        (0.0, "absolute", (True, True)),
        (0.05, "absolute", (False, False)),
        (-0.01, "absolute", (False, True)),
        (0.1, "relative", (True, False)),
        (-0.01, "relative", (True, True)),
    ],
)
def test_agrees_with_the_librarys_losses_where_they_are_right(make_model, columns, margin, strategy, switches):
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

    model, guide = make_model(0).eval(), make_model(1, 24)
    inputs = features(model, texts(7, columns))
    own = (F.normalize(torch.tensor(guide.encode(inputs[i]["guide_text"]))) for i in (0, 1))
    # Where threshold passes 1 the library counts q-q and p-p themselves.
    assert (math.prod(own).sum(1) < 0.97).all()
    # By position, in the library's own order, so that one name replaces the other.
    how = (strategy, margin, *switches)
    ours = value_and_gradients(GuidedContrastiveLoss(model, guide, 0.05, *how), model, inputs)
    cached = CachedGuidedContrastiveLoss(model, guide, 0.05, 3, None, False, *how)
    assert torch.allclose(value_and_gradients(cached, model, inputs)[0], ours[0], atol=1e-5)
    peers = [CachedGISTEmbedLoss(model, guide, 0.05, 3, None, False, *how)]
    if columns < 4:
        peers.append(GISTEmbedLoss(model, guide, 0.05, *how))
    for peer in peers:
        theirs = value_and_gradients(peer, model, bare(inputs))
        assert torch.allclose(ours[0], theirs[0], atol=1e-4) and ours[0] > 0.01
        assert all(torch.allclose(x, y, atol=1e-4, rtol=1e-3) for x, y in zip(ours[1], theirs[1], strict=True))


@pytest.mark.parametrize("cached", (False, True))
def test_arguments_have_the_librarys_names_order_and_defaults(cached):
    from inspect import signature

    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

    ours, theirs = (CachedGuidedContrastiveLoss, CachedGISTEmbedLoss) if cached else (GuidedContrastiveLoss, GISTEmbedLoss)
    wanted = signature(theirs).parameters
    found = [p for p in signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in found] == [*wanted]
    assert all(p.default == wanted[p.name].default for p in found if p.name != "guide")
    sizes = {"mini_batch_size": 5, "mini_batch_num_tokens": 9} if cached else {}
    config = ours(torch.nn.Linear(1, 1), temperature=0.5, gather_across_devices=True, **sizes).get_config_dict()
    assert config["gather_across_devices"] and config["temperature"] == 0.5 and sizes.items() <= config.items()


@pytest.mark.parametrize("wrong", ({"mini_batch_size": 0}, {"mini_batch_num_tokens": 0}, {"mini_batch_num_tokens": -1}))
def test_a_mini_batch_of_nothing_is_refused(wrong):
    with pytest.raises(UserError, match=f"{[*wrong][0]} {[*wrong.values()][0]}: needs at least 1"):
        CachedGuidedContrastiveLoss(torch.nn.Linear(1, 1), **wrong)


@pytest.mark.parametrize("guided", (True, False))
@pytest.mark.parametrize("size", (1, 3, 50))
def test_the_cached_loss_equals_the_uncached_one(make_model, guided, size):
    model, guide = make_model(0).train(), make_model(1, 24) if guided else None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # masks differ between one batch and several
    inputs = features(model, texts(7, 4))
    one = value_and_gradients(GuidedContrastiveLoss(model, guide, 0.05, margin=0.05 if guided else 0.0), model, inputs)
    cached = CachedGuidedContrastiveLoss(model, guide, 0.05, margin=0.05 if guided else 0.0, mini_batch_size=size)
    other = value_and_gradients(cached, model, inputs)
    assert torch.allclose(one[0], other[0], atol=1e-5) and one[0] > 0.01
    assert all(torch.allclose(x, y, atol=1e-5, rtol=1e-4) for x, y in zip(one[1], other[1], strict=True))
    assert not any("guide" in name for name, _ in cached.named_parameters())


class Basis(torch.nn.Module):
    """An encoder whose texts are orthogonal, exactly: token i is the i-th unit vector."""

    def forward(self, features):
        return {"sentence_embedding": torch.eye(8, dtype=torch.float64)[features["input_ids"][:, 0]]}


def test_where_the_query_is_the_positive_the_library_stops_at_log_3_and_ours_does_not(make_model):
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

    # The guide calls q-q and p-p as alike as q-p, not more: the own pair is counted three times.
    inputs = [{"input_ids": torch.arange(8)[:, None]} for _ in range(2)]
    for library in (GISTEmbedLoss(make_model(0), make_model(1)), CachedGISTEmbedLoss(make_model(0), make_model(1))):
        library.model = library.guide = Basis()
        with torch.no_grad():
            assert float(library([dict(f) for f in inputs], None)) == pytest.approx(math.log(3), abs=1e-6)
    guide = torch.eye(8, dtype=torch.float64)
    loss = GuidedContrastiveLoss(Basis(), guided=True)
    assert float(loss([f | {"guide_embedding": guide} for f in inputs])) < 1e-12
    # The same of an ordinary student.
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = guided_contrastive_loss((x, x), (guide, guide), LossSettings(0.2))
    assert torch.allclose(ours, oracle(x, x, None, guide, guide, None, 0.2))


@pytest.mark.parametrize("retokenise", (False, True))
@pytest.mark.parametrize("cached", (False, True))
def test_the_librarys_guide_reads_cut_texts_and_prompts_at_every_step_and_ours_reads_each_text_once(
    make_model, cached, retokenise
):
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

    model, guide, read = make_model(0, limit=8).eval(), make_model(1), []
    guide.register_forward_pre_hook(lambda _, given: read.extend(guide.tokenizer.batch_decode(given[0]["input_ids"], True)))
    rows = [{"anchor": w, "positive": " ".join([w, *WORDS])} for w in ("cat", "dog", "bird")]
    raw = sorted(text for row in rows for text in row.values())
    inputs = features(model, rows, prompts={"anchor": "query : "})

    library = (CachedGISTEmbedLoss if cached else GISTEmbedLoss)(model, guide)
    assert not library.must_retokenize
    library.must_retokenize, library.tokenizer = retokenise, model.tokenizer  # what another vocabulary sets
    library(bare(inputs), None)
    once = sorted(read)
    assert not set(once) & set(raw), "no text reaches the guide as it is"
    assert sum("query :" in t for t in once) == 3 and max(len(t.split()) for t in once) == 6, "the student's eight tokens"
    library(bare(inputs), None)
    assert sorted(read) == sorted(once * 2)

    read.clear()
    ours = (CachedGuidedContrastiveLoss if cached else GuidedContrastiveLoss)(model, guide)
    for _ in range(2):
        assert torch.isfinite(ours(inputs))
    assert sorted(read) == raw


def test_the_library_takes_one_negative_and_trains_its_guide_and_ours_does_neither(make_model):
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    model, guide = make_model(0), make_model(1)
    inputs = features(model, texts(3, 4))
    library = GISTEmbedLoss(model, guide)
    with pytest.raises(ValueError, match="Expected 2 or 3"):
        library(bare(inputs), None)
    library.train()
    assert guide.training and len(list(library.parameters())) > len(list(model.parameters()))

    loss = GuidedContrastiveLoss(model, guide).train()
    assert not guide.training and loss.model.training and not any(p.requires_grad for p in guide.parameters())
    assert {id(p) for p in loss.parameters()} == {id(p) for p in model.parameters()}
    assert all(m is not guide for m in loss.modules()) and all(k.startswith("model.") for k in loss.state_dict())
    assert torch.isfinite(loss(inputs))


class Spy:
    """Stands for a guide; remembers the texts that it was asked to encode."""

    def __init__(self, width=6):
        self.seen, self.width = [], width

    def eval(self):
        return self

    def requires_grad_(self, on):
        return self

    def encode(self, batch, **_):
        self.seen += batch
        return np.stack([np.random.default_rng(len(t)).normal(size=self.width) for t in batch])


def test_the_guide_reads_raw_long_text_once_per_distinct_text(make_model):
    model, spy = make_model(0, limit=8), Spy()
    long = " ".join(WORDS * 3)
    rows = [{"anchor": f"query : {w}", "positive": long + w} for w in ("cat", "dog", "cat")]
    loss = GuidedContrastiveLoss(model, spy)
    inputs = features(model, rows, guide_text=lambda t: t.removeprefix("query : "))
    assert inputs[1]["input_ids"].shape[1] == 8, "the student's text is cut"
    keys = [sorted(f) for f in inputs]
    loss(inputs)
    loss(inputs)
    assert [sorted(f) for f in inputs] == keys, "the batch is left as it was"
    assert sorted(spy.seen) == sorted(["cat", "dog", long + "cat", long + "dog"])


def test_the_guide_is_encoded_in_full_precision_inside_an_autocast_step(make_model):
    guide, other = make_model(1), make_model(1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = GuideCache(guide)(["red cat"])
    assert torch.equal(inside, GuideCache(other)(["red cat"]))


def test_the_cache_on_disk_serves_another_process_and_only_the_same_guide(make_model, tmp_path):
    guide = make_model(1)
    first = GuideCache(guide, tmp_path)(["red cat", "blue dog", "red cat"])
    GuideCache(guide, tmp_path)(["green bird"])
    again = GuideCache(make_model(1), tmp_path)
    again.guide = None  # everything must come from disk
    assert torch.equal(again(["blue dog", "red cat"]), first[[1, 0]]) and len(again(["green bird"])) == 1
    for other in (make_model(2), make_model(1, limit=4)):
        assert not GuideCache(other, tmp_path)._rows, "other weights or another length limit: another cache"
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".npz"}


def test_another_dimension_or_tokenizer_is_another_guide_and_use_changes_nothing(make_model):
    from tokenizers.normalizers import Lowercase

    guide = make_model(1)
    digest = encoder_digest(guide)
    assert guide.tokenizer.backend_tokenizer.truncation is None
    guide.encode(["red cat " * 40])
    assert guide.tokenizer.backend_tokenizer.truncation is not None, "what a call leaves behind"
    assert encoder_digest(guide) == digest
    guide.truncate_dim = 8
    assert encoder_digest(guide) != digest
    guide.truncate_dim = None
    assert encoder_digest(guide) == digest
    guide.tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert encoder_digest(guide) != digest


def test_two_caches_of_one_process_keep_one_anothers_files(make_model, tmp_path):
    for new in ("blue dog", "green bird"):
        cache = GuideCache(make_model(1), tmp_path)
        cache._rows.clear()  # as if both had been opened before either wrote
        cache(["red cat", new])
    assert len(GuideCache(make_model(1), tmp_path)._rows) == 3 and len(list(tmp_path.rglob("*.npz"))) == 2


def test_a_text_without_a_finite_guide_embedding_is_named_and_not_kept():
    class Broken(Spy):
        def encode(self, batch, **_):
            return np.stack([np.full(3, math.nan if "cat" in t else 1.0) for t in batch])

    cache = GuideCache(Broken())
    with pytest.raises(UserError, match=r"not finite for the text 'red cat red[a-z ]+\.\.\.';"):
        cache(["blue dog", "red cat " * 40])
    assert not cache._rows


def test_missing_guide_embeddings_say_how_to_attach_or_that_nothing_can_compute_them(make_model):
    model = make_model(0)
    whole = features(model, [{"anchor": "red cat " * 40, "positive": "blue dog"}] * 2)
    inputs = bare(whole)
    with pytest.raises(UserError, match="missing for column 0.*no texts in the batch.*loss.attach"):
        GuidedContrastiveLoss(model, Spy())(inputs)
    with pytest.raises(
        UserError, match=r"column 0, text 'red cat red.{40,50}\.\.\.': .*neither guide nor guide_cache; give"
    ) as caught:
        GuidedContrastiveLoss(model, guided=True)(whole)
    assert "attach" not in str(caught.value)
    with pytest.raises(ValueError, match="1 text column"):
        GuidedContrastiveLoss(model)(inputs[:1])
    with pytest.raises(ValueError, match="second copy"):
        GuidedContrastiveLoss(model, model)
    with pytest.raises(ValueError, match="margin_strategy"):
        GuidedContrastiveLoss(model, margin_strategy="other")


def test_without_a_guide_the_class_is_the_unguided_loss(make_model):
    model = make_model(0).eval()
    rows = texts(5, 3)
    inputs = features(model, rows)
    columns = [model(dict(f))["sentence_embedding"] for f in bare(inputs)]
    assert torch.allclose(GuidedContrastiveLoss(model)(inputs), unguided_contrastive_loss(columns), atol=1e-5)


def test_the_collator_passes_settings_through_and_survives_pickling():
    collator = GuidedCollator(dict(a=1), guide_text=str.lower)
    assert pickle.loads(pickle.dumps(collator)).inner == {"a": 1} and collator.keys()
    batch = GuidedCollator(lambda rows: {})([{"anchor": "X", "label": 1, "dataset_name": "d"}])
    assert sorted(batch) == ["anchor_guide_text", "anchor_text_id"]


@pytest.mark.parametrize("where", ("loss", "collator"))
def test_two_steps_of_the_trainer_with_two_negative_columns(make_model, tmp_path, where):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model, spy = make_model(0), Spy()
    before = [p.detach().clone() for p in model.parameters()]
    rows = texts(8, 4)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", prompts={"anchor": "query : "}, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    loss = GuidedContrastiveLoss(model, spy if where == "loss" else None, guided=True, temperature=0.05)
    data = Dataset.from_list(rows)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, eval_dataset=data, loss=loss)
    if where == "collator":
        trainer.data_collator = GuidedCollator(trainer.data_collator, GuideCache(spy))
    loss.attach(trainer).train()
    assert math.isfinite(trainer.state.log_history[0]["loss"]) and math.isfinite(trainer.evaluate()["eval_loss"])
    assert any(not torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
    assert set(spy.seen) == {t for row in rows for t in row.values()}, "no prompt and no cut reaches the guide"


# --- two processes ------------------------------------------------------------------------------

CLASSES = {"uncached": GuidedContrastiveLoss, "cached": CachedGuidedContrastiveLoss}
CASES = {  # columns, guided, with ids
    "triplets with a guide and equal texts": (3, True, True),
    "pairs with a guide": (2, True, False),
    "pairs without a guide, equal texts": (2, False, True),
}


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 4)

    def forward(self, features):
        return {"sentence_embedding": self.layer(features["x"])}


def one_step(kind, case, own=slice(None)):
    """[value, gradients] of the rows `own`; by DistributedDataParallel where processes have met."""
    torch.manual_seed(0)
    count, guided, with_ids = CASES[case]
    ids = [torch.tensor([0, 1, 2, 3, 0]), torch.tensor([5, 6, 5, 8, 9]), torch.tensor([10, 11, 12, 13, 1])]
    columns = [{"x": torch.randn(5, 5), "guide_embedding": torch.randn(5, 3), "text_id": i} for i in ids]
    left_out = {k for k, kept in (("guide_embedding", guided), ("text_id", with_ids)) if not kept}
    columns = [{k: v[own] for k, v in c.items() if k not in left_out} for c in columns[:count]]
    model = Linear()
    more = {"mini_batch_size": 2} if kind == "cached" else {}
    loss = CLASSES[kind](model, guided=guided, margin=0.1, temperature=0.2, gather_across_devices=True, **more)
    if dist.is_initialized():
        loss.model = torch.nn.parallel.DistributedDataParallel(model)
    value = loss(columns)
    value.backward()
    value = value.detach()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return [value, *(p.grad for p in model.parameters())]


def trained(kind, folder, output, batch):
    """Parameters after two steps of the trainer, in as many processes as there are."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model, guide = (SentenceTransformer(str(folder / name), device="cpu") for name in ("student", "guide"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=batch, max_steps=2, learning_rate=0.1, optim="sgd", use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, ddp_backend="gloo" if dist.is_initialized() else None,
    )  # fmt: skip
    more = {"mini_batch_size": 2} if kind == "cached" else {}
    loss = CLASSES[kind](model, guide, 0.05, gather_across_devices=True, **more)
    data = Dataset.from_list(texts(12, 4))
    loss.attach(SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)).train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def one_rank(folder):
    """What each of the two processes runs."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = slice(0, 3) if rank == 0 else slice(3, 5)  # shares of different size
    found = {(kind, case): one_step(kind, case, own) for kind in CLASSES for case in CASES}
    found |= {kind: trained(kind, folder, folder / f"{kind}-{rank}", 3) for kind in CLASSES}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(make_model, tmp_path_factory):
    """(folder with a student and a guide, what both processes found), from one launch for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    make_model(0).save(str(folder / "student"))
    make_model(1, 24).save(str(folder / "guide"))
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    script = folder / "two.py"
    script.write_text(
        f"import sys; sys.path[:0] = {folders!r}\n"
        f"from pathlib import Path\nimport torch, test_guided_loss\ntorch.set_num_threads(1)\n"
        f"test_guided_loss.one_rank(Path({str(folder)!r}))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", CLASSES)
def test_two_processes_that_gather_equal_one_with_the_whole_batch(ranks, kind, case):
    wanted = one_step(kind, case)
    assert wanted[0] > 0.01 and all(t.abs().max() > 0.01 for t in wanted[1:2])
    for found in ranks[1]:
        for x, y in zip(found[kind, case], wanted, strict=True):
            assert torch.allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_trainer_in_two_processes_equals_one_with_the_whole_batch(ranks, kind, tmp_path):
    folder, both = ranks
    wanted = trained(kind, folder, tmp_path, 6)
    alone = trained(kind, folder, tmp_path, 3)  # what processes that do not gather would come near at best
    assert max(float((wanted[name] - t).abs().max()) for name, t in alone.items()) > 1e-3
    for found in both:
        assert all(torch.allclose(found[kind][name], t, atol=1e-5) for name, t in wanted.items())
