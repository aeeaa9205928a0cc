import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_core.guided_loss import (
    GuideCache,
    GuidedCollator,
    GuidedContrastiveLoss,
    false_negative_mask,
    guided_contrastive_loss,
    unguided_contrastive_loss,
)

WORDS = "a b c d e f g h red blue green cat dog bird runs sleeps eats who what where is the on under tree house".split()


def oracle(a, p, n, ga, gp, gn, tau, margin=0.0, strategy="absolute", aa=True, pp=True):
    """GISTEmbed's loss written as loops; no guide (ga None) removes diagonals only."""
    unit = lambda t: None if t is None else F.normalize(t.reshape(-1, t.shape[-1]), dim=-1)  # noqa: E731
    a, p, n, ga, gp, gn = (unit(t) for t in (a, p, n, ga, gp, gn))
    total = 0.0
    for i in range(len(a)):
        own = None if ga is None else ga[i] @ gp[i]
        t = None if own is None else own - margin if strategy == "absolute" else own - own.abs() * margin
        kept = lambda x, y, t=t: t is None or x @ y <= t + 1e-6  # noqa: E731
        g = lambda side, k: None if side is None else side[k]  # noqa: E731
        logits = [a[i] @ p[i]]
        logits += [a[i] @ p[j] for j in range(len(p)) if j != i and kept(g(ga, i), g(gp, j))]
        logits += [p[i] @ p[j] for j in range(len(p)) if pp and j != i and kept(g(gp, i), g(gp, j))]
        logits += [a[i] @ a[j] for j in range(len(a)) if aa and j != i and kept(g(ga, i), g(ga, j))]
        logits += [a[i] @ n[j] for j in range(0 if n is None else len(n)) if kept(g(ga, i), g(gn, j))]
        total = total + torch.logsumexp(torch.stack(logits) / tau, 0) - logits[0] / tau
    return total / len(a)


def draw(seed, b, d, k):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return make(b, d), make(b, d), make(b, k, d) if k else None, make(b, 3), make(b, 3), make(b, k, 3) if k else None


def call(a, p, n, ga, gp, gn, **more):
    return guided_contrastive_loss(a, p, n, guide_anchors=ga, guide_positives=gp, guide_negatives=gn, **more)


# --- the function -------------------------------------------------------------------------------


@given(
    st.integers(0, 10**6),
    st.integers(1, 7),
    st.integers(0, 3),
    st.sampled_from([-0.3, 0.0, 0.2]),
    st.sampled_from(["absolute", "relative"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradient_equal_the_loops(seed, b, k, margin, strategy, aa, pp, guided):
    tensors = list(draw(seed, b, 5, k))
    inputs = [t.requires_grad_() for t in tensors[:3] if t is not None]
    if guided:
        wanted = oracle(*tensors, 0.2, margin, strategy, aa, pp)
        more = {"margin": margin, "margin_strategy": strategy, "contrast_anchors": aa, "contrast_positives": pp}
        ours = call(*tensors, temperature=0.2, block_size=2, **more)
    else:
        wanted = oracle(*tensors[:3], None, None, None, 0.2, aa=aa, pp=pp)
        ours = unguided_contrastive_loss(*tensors[:3], temperature=0.2, contrast_anchors=aa, contrast_positives=pp)
    reference = torch.autograd.grad(wanted, inputs, allow_unused=True)
    assert torch.allclose(ours, wanted, atol=1e-8)
    for x, y in zip(torch.autograd.grad(ours, inputs), reference, strict=True):
        assert torch.allclose(x, torch.zeros_like(x) if y is None else y, atol=1e-8)


@pytest.mark.parametrize("k", (0, 2))
def test_gradcheck_passes_with_an_offset_and_text_ids(k):
    a, p, n, ga, gp, gn = draw(1, 5, 4, k)
    ids = (torch.arange(3), torch.tensor([9, 1, 9, 7, 8]), torch.arange(20, 20 + 3 * k).view(3, k) if k else None)
    n, gn = (None, None) if n is None else (n[:3], gn[:3])

    def f(a, p, *n):
        more = {"text_ids": ids, "anchor_offset": 2, "temperature": 0.3, "block_size": 2}
        return call(a, p, n[0] if n else None, ga[:3], gp, gn, **more)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (a[:3].clone(), p, n) if t is not None])


def test_a_second_derivative_is_refused_not_wrong():
    a, p, *_ = draw(0, 3, 4, 0)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(unguided_contrastive_loss(a.requires_grad_(), p), a, create_graph=True)


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
    view = false_negative_mask(ga, gp, gn, margin=margin, margin_strategy=strategy)
    assert not any(view.removed[block].diagonal().any() for block in ("ap", "aa", "pp"))


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_the_block_size_changes_nothing(seed, b, size):
    tensors = draw(seed, b, 4, 1)
    assert torch.allclose(call(*tensors, block_size=size), call(*tensors), rtol=1e-12)


def test_a_duplicate_of_the_own_positive_is_not_removed_by_rounding():
    torch.manual_seed(0)
    for size in (8, 384, 4096):
        ga, gp = torch.randn(64, size), torch.randn(64, size)
        gp[1::2] = gp[::2]
        duplicates = torch.arange(64) ^ 1
        assert not false_negative_mask(ga, gp).removed["ap"][torch.arange(64), duplicates].any()


def test_the_protected_positive_survives_any_margin():
    tensors = draw(3, 4, 5, 1)
    assert call(*tensors, margin=5.0) < 1e-9, "with every negative removed the loss is zero"
    assert torch.isfinite(call(*tensors, margin=-5.0)), "with nothing removed but the diagonals"


def test_a_relative_margin_lowers_the_threshold_of_a_negative_similarity_too():
    ga, gp = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-0.6, 0.8], [0.8, -0.6]])
    view = false_negative_mask(ga, gp, margin=0.5, margin_strategy="relative")
    assert torch.allclose(view.threshold, torch.tensor([-0.9, -0.9]))


def test_query_equal_to_positive_can_reach_zero():
    x = torch.eye(4)
    assert guided_contrastive_loss(x, x, guide_anchors=x, guide_positives=x) < 1e-6


@pytest.mark.parametrize("guided", (True, False))
def test_texts_with_the_same_id_are_no_negatives(guided):
    x, y = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(3, 8), dim=1)
    ids = (torch.tensor([0, 1, 2]), torch.tensor([3, 1, 3]), [torch.tensor([2, 0, 5])])
    more = {"guide_anchors": x, "guide_positives": x, "guide_negatives": [x]} if guided else {}  # t = 1: keeps all
    switches = {"contrast_anchors": False, "contrast_positives": False, "temperature": 0.1}
    ours = guided_contrastive_loss(x, y, [y], text_ids=ids, **more, **switches)
    logits = (torch.cat([x @ y.T, x @ y.T], 1)) / 0.1
    for i, j in ((0, 2), (2, 0), (0, 4), (2, 3)):  # 0 and 2 share a positive; negatives 1 and 0 are anchors 0 and 2
        logits[i, j] = float("-inf")
    assert torch.allclose(ours, F.cross_entropy(logits, torch.arange(3)), atol=1e-5)


def test_gathered_candidates_with_an_offset_equal_the_rows_of_the_whole_batch():
    a, p, n, ga, gp, gn = draw(5, 6, 4, 2)
    switches = {"contrast_anchors": False, "temperature": 0.2, "margin": 0.1, "reduction": "sum"}
    whole = call(a, p, n, ga, gp, gn, **switches)
    parts = [
        call(a[s], p, n, ga[s], gp, gn, anchor_offset=s.start, **switches) for s in (slice(0, 2), slice(2, 6))
    ]  # fmt: skip
    assert torch.allclose(whole, sum(parts), atol=1e-9)
    switches["contrast_anchors"] = True
    parts = [call(a, p, n, ga, gp, gn, rows=r, **switches) for r in ((0, 2), (2, 6))]
    assert torch.allclose(call(a, p, n, ga, gp, gn, **switches), sum(parts), atol=1e-9)


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
    view = false_negative_mask(ga, gp, gn, margin=0.1)
    unit = [F.normalize(t.reshape(-1, 3), dim=1) for t in (ga, gp, gn)]
    assert torch.allclose(view.threshold, (unit[0] * unit[1]).sum(1) - 0.1)
    assert torch.allclose(view.similarity["an"], unit[0] @ unit[2].T)
    assert torch.equal(view.removed["an"], view.similarity["an"] > view.threshold[:, None])
    shapes = {k: tuple(v.shape) for k, v in view.removed.items()}
    assert shapes == {"ap": (5, 5), "an": (5, 10), "aa": (5, 5), "pp": (5, 5)}


BAD = [
    ({"positives": torch.ones(2, 4)}, r"positives: shape \(2, 4\), but anchors \(3, 4\).*needs its own positive"),
    ({"positives": torch.ones(3, 5)}, r"positives: shape \(3, 5\), but anchors \(3, 4\)"),
    ({"anchor_offset": 1}, "anchor_offset 1"),
    ({"negatives": torch.ones(2, 4)}, r"negatives: shape \(2, 4\).*expected \(3, 4\)"),
    ({"negatives": [torch.ones(3, 4), torch.ones(3, 5)]}, r"negatives: shape .*\(3, 5\)"),
    ({"negatives": torch.ones(3, 4)}, r"guide_negatives: \[3, 3, 0\] rows, but \[3, 3, 3\]"),
    ({"guide_positives": None}, "guide_positives missing"),
    ({"guide_anchors": torch.ones(2, 4)}, r"guide_anchors"),
    ({"text_ids": (torch.arange(3), torch.arange(2), None)}, r"text_ids: \[3, 2, 0\] ids for \[3, 3, 0\]"),
    ({"anchors": torch.full((3, 4), float("nan"))}, "anchors: row 0 of shape .* not finite"),
    ({"guide_positives": torch.full((3, 4), float("inf"))}, "guide_positives: row 0 .* not finite"),
    ({"margin_strategy": "other"}, "margin_strategy 'other'"),
    ({"temperature": 0.0}, "temperature 0.0"),
    ({"margin": float("nan")}, "margin nan"),
    ({"reduction": "none"}, "reduction 'none'"),
    ({"rows": (2, 4)}, "rows"),
]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_bad_input_gets_one_line_that_names_the_argument(change, says):
    values = {k: torch.ones(3, 4) for k in ("anchors", "positives", "guide_anchors", "guide_positives")} | change
    a, p, n = values.pop("anchors"), values.pop("positives"), values.pop("negatives", None)
    with pytest.raises(ValueError, match=says) as caught:
        guided_contrastive_loss(a, p, n, **values)
    assert "\n" not in str(caught.value)


def test_a_margin_without_a_guide_is_refused():
    with pytest.raises(ValueError, match="margin.*without a guide"):
        unguided_contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), margin=0.1)


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


def features(model, rows, **collator):
    """What the trainer hands to a loss for these rows, by the trainer's own code."""
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    batch = GuidedCollator(SentenceTransformerDataCollator(model.preprocess), **collator)(rows)
    return SentenceTransformerTrainer.collect_features(None, batch)[0]


def value_and_gradients(loss, model, inputs):
    model.zero_grad()
    value = loss([dict(f) for f in inputs], None)
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def bare(inputs):
    return [{k: v for k, v in f.items() if k not in ("text_id", "guide_text", "guide_embedding")} for f in inputs]


@pytest.mark.parametrize("columns", (2, 3, 4))
@pytest.mark.parametrize(("margin", "strategy"), [(0.0, "absolute"), (0.05, "absolute"), (0.1, "relative")])
def test_agrees_with_the_librarys_losses_where_they_are_right(make_model, columns, margin, strategy):
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

    model, guide = make_model(0).eval(), make_model(1, 24)
    inputs = features(model, texts(7, columns))
    settings = {"temperature": 0.05, "margin": margin, "margin_strategy": strategy}
    ours = value_and_gradients(GuidedContrastiveLoss(model, guide, **settings), model, inputs)
    peers = [CachedGISTEmbedLoss(model, guide, mini_batch_size=3, **settings)]
    if columns < 4:
        peers.append(GISTEmbedLoss(model, guide, **settings))
    for peer in peers:
        theirs = value_and_gradients(peer, model, bare(inputs))
        assert torch.allclose(ours[0], theirs[0], atol=1e-4) and ours[0] > 0.01
        assert all(torch.allclose(x, y, atol=1e-4, rtol=1e-3) for x, y in zip(ours[1], theirs[1], strict=True))


@pytest.mark.parametrize("guided", (True, False))
@pytest.mark.parametrize("size", (1, 3, 50))
def test_the_cached_loss_equals_the_uncached_one(make_model, guided, size):
    from speed_core.cached_loss import CachedGuidedContrastiveLoss

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


def test_where_the_query_is_the_positive_the_library_stops_above_log_3_and_ours_does_not(make_model):
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    model, guide = make_model(0).eval(), make_model(1)
    rows = [{"anchor": w, "positive": w} for w in WORDS[:4]]
    inputs = features(model, rows)
    with torch.no_grad():
        library = GISTEmbedLoss(model, guide)(bare(inputs), None)
        ours = GuidedContrastiveLoss(model, guide)(inputs)
        wanted = unguided_contrastive_loss(*[guide.encode(WORDS[:4], convert_to_tensor=True)] * 2)
    assert library > math.log(3) - 0.45 and ours < library - 0.3 and torch.isfinite(wanted)


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
    assert not list(tmp_path.rglob("*.tmp"))


def test_missing_guide_embeddings_say_how_to_attach(make_model):
    model = make_model(0)
    inputs = bare(features(model, texts(2, 2)))
    with pytest.raises(ValueError, match="missing for column 0.*loss.attach"):
        GuidedContrastiveLoss(model, Spy())(inputs)
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
    assert torch.allclose(GuidedContrastiveLoss(model)(inputs), unguided_contrastive_loss(*columns), atol=1e-5)


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


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 4)

    def forward(self, features):
        return {"sentence_embedding": self.layer(features["x"])}


def two_process_batch():
    torch.manual_seed(0)
    ids = [torch.tensor([0, 1, 2, 3, 0]), torch.tensor([5, 6, 5, 8, 9]), torch.tensor([10, 11, 12, 13, 1])]
    columns = [{"x": torch.randn(5, 5), "guide_embedding": torch.randn(5, 3), "text_id": i} for i in ids]
    more = {"guided": True, "margin": 0.1, "temperature": 0.2, "gather_across_processes": True}
    model = Linear()
    return model, GuidedContrastiveLoss(model, **more), columns


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, loss, columns = two_process_batch()
    own = slice(0, 3) if rank == 0 else slice(3, 5)  # shares of different size
    value = loss([{k: v[own] for k, v in c.items()} for c in columns])
    value.backward()
    for t in (value := value.detach(), *(p.grad for p in model.parameters())):
        dist.all_reduce(t)
        t /= 2  # what DistributedDataParallel does
    torch.save([value, *(p.grad for p in model.parameters())], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_that_gather_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    model, loss, columns = two_process_batch()
    value, gradients = value_and_gradients(loss, model, columns)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for x, y in zip(found, [value, *gradients], strict=True):
            assert torch.allclose(x, y, atol=1e-5)
