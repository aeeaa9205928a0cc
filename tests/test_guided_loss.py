import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_core.guided_loss import GuideCache, GuidedCollator, GuidedContrastiveLoss, false_negative_mask, guided_contrastive_loss


def oracle(a, p, n, ga, gp, gn, tau, margin, strategy, ids=None):
    """GISTEmbed's loss written as loops."""
    a, p, ga, gp = (F.normalize(t, dim=-1) for t in (a, p, ga, gp))
    n, gn = (None, None) if n is None else (F.normalize(t.reshape(-1, t.shape[-1]), dim=-1) for t in (n, gn))
    total = 0.0
    for i in range(len(a)):
        own = ga[i] @ gp[i]
        t = own - margin if strategy == "absolute" else own - own.abs() * margin
        logits = [a[i] @ p[i]]
        for j in range(len(p)):
            if j != i and ga[i] @ gp[j] <= t + 1e-6:
                logits.append(a[i] @ p[j])
            if j != i and gp[i] @ gp[j] <= t + 1e-6:
                logits.append(p[i] @ p[j])
            if j != i and ga[i] @ ga[j] <= t + 1e-6:
                logits.append(a[i] @ a[j])
        for j in range(0 if n is None else len(n)):
            if ga[i] @ gn[j] <= t + 1e-6:
                logits.append(a[i] @ n[j])
        total = total + torch.logsumexp(torch.stack(logits) / tau, 0) - logits[0] / tau
    return total / len(a)


def draw(seed, b, d, k):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return make(b, d), make(b, d), make(b, k, d) if k else None, make(b, 3), make(b, 3), make(b, k, 3) if k else None


def call(a, p, n, ga, gp, gn, **more):
    return guided_contrastive_loss(a, p, n, guide_anchors=ga, guide_positives=gp, guide_negatives=gn, **more)


@given(
    st.integers(0, 10**6),
    st.integers(1, 7),
    st.integers(0, 3),
    st.sampled_from([-0.3, 0.0, 0.2]),
    st.sampled_from(["absolute", "relative"]),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradient_equal_the_loops(seed, b, k, margin, strategy):
    tensors = draw(seed, b, 5, k)
    for t in tensors[:3]:
        if t is not None:
            t.requires_grad_()
    wanted = oracle(*tensors, 0.2, margin, strategy)
    inputs = [t for t in tensors[:3] if t is not None]
    reference = torch.autograd.grad(wanted, inputs, allow_unused=True)
    ours = call(*tensors, temperature=0.2, margin=margin, margin_strategy=strategy, block_size=2)
    assert torch.allclose(ours, wanted, atol=1e-8)
    for x, y in zip(torch.autograd.grad(ours, inputs), reference, strict=True):
        assert torch.allclose(x, torch.zeros_like(x) if y is None else y, atol=1e-8)


def test_gradcheck():
    a, p, n, ga, gp, gn = draw(1, 5, 4, 2)
    f = lambda a, p, n: call(a, p, n, ga, gp, gn, temperature=0.3, block_size=2)  # noqa: E731
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (a, p, n)])


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_never_nan_with_zero_rows_duplicates_and_low_precision(seed, dtype, zero):
    a, p, n, ga, gp, gn = (t.to(dtype) for t in draw(seed, 6, 5, 2))
    p[1] = p[0]
    gp[1] = gp[0]
    if zero:
        a[2], ga[2] = 0, 0
    a.requires_grad_()
    loss = call(a, p, n, ga, gp, gn)
    loss.backward()
    assert torch.isfinite(loss) and loss >= 0 and torch.isfinite(a.grad).all()


def test_a_duplicate_of_the_own_positive_is_not_removed_by_rounding():
    torch.manual_seed(0)
    ga, gp = torch.randn(64, 384), torch.randn(64, 384)
    gp[1] = gp[0]
    assert not false_negative_mask(ga, gp).removed["ap"][0, 1]


def test_the_protected_positive_survives_any_margin():
    a, p, n, ga, gp, gn = draw(3, 4, 5, 1)
    assert torch.isfinite(call(a, p, n, ga, gp, gn, margin=5.0))
    assert call(a, p, n, ga, gp, gn, margin=5.0) < 1e-9, "with every negative removed the loss is zero"


def test_query_equal_to_positive_can_reach_zero_where_the_library_stops_at_log_3():
    x = torch.eye(4)
    assert guided_contrastive_loss(x, x, guide_anchors=x, guide_positives=x) < 1e-6


def test_texts_with_the_same_id_are_no_negatives():
    x, y = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(3, 8), dim=1)
    y[2] = y[0]
    ids = (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 3]), None)
    with_ids = guided_contrastive_loss(x, y, text_ids=ids, contrast_anchors=False, contrast_positives=False, temperature=0.1)
    logits = (x @ y.T) / 0.1
    logits[0, 2] = logits[2, 0] = float("-inf")
    assert torch.allclose(with_ids, F.cross_entropy(logits, torch.arange(3)), atol=1e-5)


def test_gathered_candidates_with_an_offset_equal_the_rows_of_the_whole_batch():
    a, p, _, ga, gp, _ = draw(5, 6, 4, 0)
    switches = {"contrast_anchors": False, "temperature": 0.2, "margin": 0.1, "reduction": "sum"}
    whole = guided_contrastive_loss(a, p, guide_anchors=ga, guide_positives=gp, **switches)
    halves = [
        guided_contrastive_loss(a[s], p, guide_anchors=ga[s], guide_positives=gp, anchor_offset=s.start, **switches)
        for s in (slice(0, 3), slice(3, 6))
    ]
    assert torch.allclose(whole, sum(halves), atol=1e-9)


class Fixed(torch.nn.Module):
    """Stands for an encoder inside the library's loss: returns the embeddings that it is handed."""

    def __init__(self, key):
        super().__init__()
        self.key = key

    def forward(self, features):
        return {"sentence_embedding": features[self.key]}


@pytest.mark.parametrize("columns", (2, 3))
def test_agrees_with_the_librarys_loss_where_that_is_right(columns):
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    torch.manual_seed(columns)
    student = [torch.randn(6, 8, requires_grad=True) for _ in range(columns)]
    guide = [torch.randn(6, 5) for _ in range(columns)]
    library = GISTEmbedLoss.__new__(GISTEmbedLoss)
    torch.nn.Module.__init__(library)
    library.model, library.guide = Fixed("s"), Fixed("g")
    library.cross_entropy_loss = torch.nn.CrossEntropyLoss()
    library.temperature, library.margin, library.margin_strategy = 0.05, 0.1, "absolute"
    library.contrast_anchors = library.contrast_positives = True
    library.gather_across_devices, library.must_retokenize = False, False
    library.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
    wanted = library([{"s": s, "g": g} for s, g in zip(student, guide, strict=True)], None)
    reference = torch.autograd.grad(wanted, student)
    more = {"guide_negatives": guide[2]} if columns == 3 else {}
    negatives = student[2] if columns == 3 else None
    ours = guided_contrastive_loss(
        student[0], student[1], negatives, guide_anchors=guide[0], guide_positives=guide[1], temperature=0.05, margin=0.1, **more
    )
    assert torch.allclose(ours, wanted, atol=1e-5)
    for x, y in zip(torch.autograd.grad(ours, student), reference, strict=True):
        assert torch.allclose(x, y, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"positives": torch.ones(2, 4)}, "each anchor needs its own positive"),
        ({"margin_strategy": "other"}, "margin_strategy"),
        ({"guide_positives": None}, "guide embeddings"),
        ({"guide_anchors": torch.ones(2, 4)}, "guide_"),
        ({"anchors": torch.full((3, 4), float("nan"))}, "not finite"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_input_names_the_argument(change, says):
    values = {
        "anchors": torch.ones(3, 4),
        "positives": torch.ones(3, 4),
        "guide_anchors": torch.ones(3, 4),
        "guide_positives": torch.ones(3, 4),
    }
    with pytest.raises(ValueError, match=says):
        guided_contrastive_loss(**(values | change))


def test_the_guide_is_frozen_cached_and_reads_raw_text(tmp_path):
    from sentence_transformers import SentenceTransformer

    from speed_core import models

    guide = SentenceTransformer(models.resolve("package:all-MiniLM-L6-v2"), device="cpu")
    cache = GuideCache(guide, tmp_path)
    first = cache(["one text", "two", "one text"])
    assert torch.equal(first[0], first[2]) and not any(p.requires_grad for p in guide.parameters())
    again = GuideCache(guide, tmp_path)
    again.guide = None  # everything must come from disk
    assert torch.equal(again(["two"])[0], first[1])
    loss = GuidedContrastiveLoss(torch.nn.Linear(2, 2))
    assert len(list(loss.parameters())) == 2 and not any("guide" in k for k in loss.state_dict())
    collator = GuidedCollator(lambda rows: {"n": len(rows)}, cache, lambda t: t.removeprefix("Query: "))
    batch = collator([{"anchor": "Query: two", "positive": "one text"}])
    assert torch.equal(batch["anchor_guide_embedding"][0], first[1]) and batch["n"] == 1
