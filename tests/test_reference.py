"""The short equations of `reference` and the fast code say the same."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Pooling
from sklearn.metrics import ndcg_score

from speed_core import reference
from speed_core.contrastive import embedder
from speed_core.contrastive.guided_loss import false_negative_mask, guided_contrastive_loss, unguided_contrastive_loss
from speed_core.contrastive.loss_inputs import LossSettings
from speed_core.data import minhash, prompts
from speed_core.evaluation import uncertainty
from speed_core.generation import sft
from speed_core.models import loading
from speed_core.preference import dpo, prompt_sharing

SEEDS = st.integers(0, 10_000)


def vectors(seed, *shapes):
    """Random unit vectors, in double precision."""
    random = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(*shape, generator=random, dtype=torch.float64), dim=-1) for shape in shapes]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.integers(1, 6))
def test_a_topic_loses_the_same_levels(levels, depth):
    assert reference.truncate_topic("/".join(levels), depth) == prompts.truncate_topic("/".join(levels), depth)


def test_the_completion_loss_is_that_of_sft(tiny_model):
    model = loading.load_causal_lm(tiny_model("gemma3"), dtype="float32")
    ids = torch.randint(5, 2000, (3, 12), generator=torch.Generator().manual_seed(0))
    scored = torch.arange(12)[None] >= torch.tensor([[3], [7], [11]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(~scored, -100)}
    with torch.no_grad():
        ours = reference.completion_loss(model(ids).logits, ids, scored)
        fast = sft.completion_loss(model, batch, scored.sum())
    assert torch.allclose(ours, fast, atol=1e-5)


@given(SEEDS, st.floats(0.01, 2))
@settings(max_examples=30)
def test_the_dpo_loss_is_that_of_training(seed, beta):
    policy, start = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed)) * 9
    pairs = torch.tensor([[0, 1], [2, 3], [5, 4]])
    chosen, rejected = pairs.T
    fast = dpo.batch_losses(policy, {"reference": start, "pairs": pairs, "lengths": torch.ones(6)}, beta=beta)
    assert torch.allclose(reference.dpo_loss(policy[chosen], policy[rejected], start[chosen], start[rejected], beta), fast)


@given(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_mask_of_a_shared_prompt_is_that_of_training(prompt, completions):
    group = prompt_sharing.PromptGroup([5] * prompt, [[6] * n for n in completions], [(0, len(completions) - 1, 1.0)])
    batch = prompt_sharing.collate([group], 0)
    fast = prompt_sharing.dense_mask(batch["group"], batch["segment_ids"], batch["position_ids"])[0, 0]
    assert torch.equal(reference.shared_prompt_mask(batch["segment_ids"][0]), fast)


def test_pooling_takes_the_vector_that_the_embedding_model_gives(tiny_model):
    model, texts = embedder.build_embedder(tiny_model("llama"), 64, "float32"), ["a cat", "a cat sleeps on the warm roof", "x"]
    read = model.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model[0].model(**read).last_hidden_state
    fast = model.encode(texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
    assert torch.allclose(reference.last_token_pooling(hidden, read["attention_mask"]), fast.cpu(), atol=1e-5)
    mean = Pooling(hidden.shape[2], pooling_mode="mean")({"token_embeddings": hidden, "attention_mask": read["attention_mask"]})
    fast = F.normalize(mean["sentence_embedding"], dim=1)
    assert torch.allclose(reference.mean_pooling(hidden, read["attention_mask"]), fast, atol=1e-5)


@given(SEEDS, st.integers(1, 6), st.sampled_from([0.02, 0.2]))
@settings(max_examples=30, deadline=None)
def test_info_nce_is_the_loss_without_a_guide(seed, size, temperature):
    q, p, n = vectors(seed, (size, 5), (size, 5), (size, 5))
    settings = LossSettings(temperature, contrast_anchors=False, contrast_positives=False)
    fast = unguided_contrastive_loss((q, p, n), settings)
    assert torch.allclose(reference.info_nce(q, p, n, temperature), fast)


@given(SEEDS, st.integers(2, 7), st.floats(0, 0.3))
@settings(max_examples=50, deadline=None)
def test_the_guides_mask_and_the_guided_loss_are_those_of_training(seed, size, margin):
    q, p, gq, gp = vectors(seed, (size, 5), (size, 5), (size, 3), (size, 3))
    ours = reference.guide_mask(gq @ gp.T, margin).fill_diagonal_(False)
    assert torch.equal(ours, false_negative_mask((gq, gp), LossSettings(margin=margin)).removed["ap"])
    fast = guided_contrastive_loss((q, p), (gq, gp), LossSettings(temperature=0.1))
    assert torch.allclose(reference.guided_loss(q, p, gq, gp, 0.1), fast)


@given(*[st.lists(st.sampled_from("a b c d e".split()), min_size=3, max_size=12).map(" ".join)] * 2)
def test_the_similarity_of_two_texts_is_that_of_deduplication(one, other):
    assert reference.jaccard(one, other) == pytest.approx(minhash.jaccard(minhash.shingles(one, 3), minhash.shingles(other, 3)))


@given(st.lists(st.booleans(), min_size=2, max_size=14).filter(any), st.integers(1, 12))
def test_ndcg_is_that_of_scikit_learn(relevant, cutoff):
    ranks = [rank for rank, hit in enumerate(relevant, 1) if hit]
    theirs = ndcg_score([[float(hit) for hit in relevant]], [[-float(i) for i in range(len(relevant))]], k=cutoff)
    assert reference.ndcg(ranks, cutoff) == pytest.approx(theirs)


def test_the_interval_is_that_of_the_figures():
    scores = torch.rand(4, 200, generator=torch.Generator().manual_seed(1)) + torch.tensor([[0.0], [0.02], [0.05], [0.01]])
    results = [{"tasks": {"t": {"type": "Retrieval", "score": float(s.mean()), "items": s.tolist()}}} for s in scores]
    fast = uncertainty.average(results)
    critical = (fast.high - fast.low) / 2 / fast.error
    low, high = (100 * v for v in reference.interval(scores, 4000, critical))
    assert (low + high) / 2 == pytest.approx(fast.value)
    assert high - low == pytest.approx(fast.high - fast.low, rel=0.06)  # two bootstraps of 1,000 and 4,000 draws


def test_the_numbers_of_minhash_agree_as_often_as_texts_are_alike():
    one = "how long do hens lay eggs in a year"
    for other in (one, "how long do hens lay eggs in a winter", "how long do hens lay eggs if the nights are cold", "a b c d"):
        a, b = (reference.minhash(text, count=1000) for text in (one, other))
        agree = sum(x == y for x, y in zip(a, b, strict=True)) / 1000
        assert agree == pytest.approx(reference.jaccard(one, other), abs=0.05)
    assert reference.minhash(one, 8) == reference.minhash(one, 128)[:8]


def test_two_bands_agree_as_often_as_the_curve_says():
    one, other = (reference.minhash(f"how long do hens lay eggs in a {x}", count=1600) for x in ("year", "winter"))
    bands = [one[i : i + 4] == other[i : i + 4] for i in range(0, 1600, 4)]
    found = [sum(bands[i : i + 8]) > 1 for i in range(0, 400, 8)]  # fifty times eight bands
    assert sum(found) / 50 == pytest.approx(minhash.probability(0.75, bands=8, rows=4), abs=0.15)
