"""The nucleus without a sort equals its definition, and both engines sample from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_core import sampling


def by_definition(logits, p):
    """Sort, add up from the top, and keep while what came before holds less than p."""
    out = torch.full_like(logits, -torch.inf)
    for i, row in enumerate(logits):
        before = 0.0
        for token in row.double().softmax(-1).argsort(descending=True).tolist():
            if before >= p:
                break
            out[i, token] = row[token]
            before += float(row.double().softmax(-1)[token])
    return out


@given(st.integers(0, 2**31), st.sampled_from((0.01, 0.3, 0.9, 0.95, 0.999)), st.sampled_from((0.1, 1.0, 6.0)))
@settings(max_examples=60, deadline=None)
def test_it_equals_the_definition_for_flat_and_for_peaked_rows(seed, p, spread):
    logits = spread * torch.randn(4, 600, generator=torch.Generator().manual_seed(seed))
    logits[0, 100:] = -torch.inf  # a grammar's mask
    kept, wanted = sampling.nucleus(logits, p), by_definition(logits, p)
    edge = (kept.isfinite() != wanted.isfinite()).sum(-1)
    assert edge.max() <= 1, "more than the token at the edge, where rounding decides, differs"
    both = kept.isfinite() & wanted.isfinite()
    assert torch.equal(kept[both], logits[both]) and kept.isfinite().any(-1).all()


def test_a_row_whose_nucleus_is_wider_than_the_candidates_is_looked_at_whole():
    flat = torch.zeros(2, 3 * sampling.SECOND)
    flat[1, 7] = 50.0
    kept = sampling.nucleus(flat, 0.9).isfinite().sum(-1)
    assert kept[1] == 1 and abs(int(kept[0]) - 0.9 * flat.shape[-1]) <= 2


def test_it_agrees_with_the_filters_of_transformers_and_vllm():
    vllm = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    from transformers import TopPLogitsWarper

    logits = 3 * torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0))
    ours = sampling.nucleus(logits, 0.95)
    for theirs in (
        TopPLogitsWarper(0.95)(None, logits.clone()),
        vllm.apply_top_k_top_p_pytorch(logits.clone(), None, torch.full((8,), 0.95)),
    ):
        assert (ours.isfinite() != theirs.isfinite()).sum(-1).max() <= 1
        both = ours.isfinite() & theirs.isfinite()
        assert torch.equal(ours[both], theirs[both]) and both.sum() > 8000


def test_p_of_one_changes_nothing():
    logits = torch.randn(2, 10)
    assert sampling.nucleus(logits, 1.0) is logits
