"""The nucleus without a sort equals its definition, and both engines sample from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_core.generation import top_p


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
    kept, wanted = top_p.top_p_filter(logits.clone(), p), by_definition(logits, p)
    edge = (kept.isfinite() != wanted.isfinite()).sum(-1)
    assert edge.max() <= 1, "more than the token at the edge, where rounding decides, differs"
    both = kept.isfinite() & wanted.isfinite()
    assert torch.equal(kept[both], logits[both]) and kept.isfinite().any(-1).all()


def test_a_row_whose_nucleus_is_wider_than_the_candidates_is_looked_at_whole():
    flat = torch.zeros(2, 3 * top_p.CANDIDATES[-1])
    flat[1, 7] = 50.0
    kept = top_p.top_p_filter(flat.clone(), 0.9).isfinite().sum(-1)
    assert kept[1] == 1 and abs(int(kept[0]) - 0.9 * flat.shape[-1]) <= 2


def test_it_agrees_with_the_filters_of_transformers_and_vllm():
    vllm = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    from transformers import TopPLogitsWarper

    logits = 3 * torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0))
    ours = top_p.top_p_filter(logits.clone(), 0.95)
    for theirs in (
        TopPLogitsWarper(0.95)(None, logits.clone()),
        vllm.apply_top_k_top_p_pytorch(logits.clone(), None, torch.full((8,), 0.95)),
    ):
        assert (ours.isfinite() != theirs.isfinite()).sum(-1).max() <= 1
        both = ours.isfinite() & theirs.isfinite()
        assert torch.equal(ours[both], theirs[both]) and both.sum() > 8000


def test_p_of_one_changes_nothing():
    logits = torch.randn(2, 10)
    assert top_p.top_p_filter(logits, 1.0) is logits


def test_the_mass_of_a_row_has_the_same_bits_with_one_thread_and_with_two():
    logits = 3 * torch.randn(3, 262_144 + 7, generator=torch.Generator().manual_seed(0))
    logits[2, 512:] = -torch.inf  # pieces without any token that a grammar allows
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(torch.cat([top_p.log_mass(row) for row in logits.split(1)]))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.allclose(found[0].double(), logits.double().logsumexp(-1, keepdim=True), rtol=0, atol=4e-6)


def test_noise_draws_each_token_as_often_as_its_probability_and_a_row_does_not_depend_on_the_others():
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    draws = top_p.SeededNoise(range(20_000))(None, logits.repeat(20_000, 1)).argmax(-1)
    assert torch.allclose(draws.bincount(minlength=4) / 20_000, logits.exp(), atol=0.012)
    some = [7, 19_999, 3]
    assert torch.equal(top_p.SeededNoise(some)(None, logits.repeat(3, 1)).argmax(-1), draws[some])


def test_split_mix_gives_the_published_numbers():
    found = top_p.split_mix(torch.tensor([1, 2, 3])).tolist()
    assert [n % 2**64 for n in found] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.integers(0, 2**31 - 1), st.integers(1, 5000), st.data())
@settings(max_examples=40, deadline=None)
def test_noise_at_a_few_places_is_the_noise_at_all_and_each_step_has_its_own(seed, size, data):
    places = data.draw(st.sets(st.integers(0, size - 1)))
    few = torch.full((1, size), -torch.inf)
    few[0, list(places)] = 0.0
    one, other = top_p.SeededNoise([seed]), top_p.SeededNoise([seed])
    steps = []
    for _ in range(2):
        whole, some = one(None, torch.zeros(1, size)), other(None, few.clone())
        assert torch.equal(some, whole + few)
        steps.append(whole)
    assert whole.isfinite().all() and not torch.equal(*steps)
