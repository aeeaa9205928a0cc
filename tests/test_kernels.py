"""The Triton kernels against the path in plain PyTorch, under Triton's interpreter on the CPU.

Collected only when TRITON_INTERPRET=1 is set before Python starts (`make test` does), since Triton reads it on import.
The interpreter has no bfloat16 products; that type needs a GPU (`benchmarks/guided_loss.py --device cuda`).
"""

import pytest
import torch
import triton  # noqa: F401  without it both sides would be the same path

from speed_core import guided_loss
from speed_core.guided_loss import guided_contrastive_loss


def both(monkeypatch, columns, guide, dtype=torch.float32, **settings):
    """(value, gradients) by the kernels and by matrix products."""
    out = []
    for kernels in (True, False):
        with monkeypatch.context() as patch:
            if not kernels:
                patch.setattr(guided_loss, "_kernel_dtype", lambda given, unit: None)
            assert (guided_loss._kernel_dtype(dtype, torch.zeros(1)) is not None) == kernels
            leaves = [c.to(dtype).requires_grad_() for c in columns]
            more = dict(settings)
            if guide:
                more |= dict(guide_anchors=guide[0], guide_positives=guide[1])
                more |= dict(guide_negatives=guide[2]) if len(guide) > 2 else {}
            loss = guided_contrastive_loss(*leaves, temperature=0.05, **more)
            loss.backward()
            out.append((loss.detach(), [c.grad.float() for c in leaves]))
    return out


def draw(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=g) for s in shapes]


def close(found, tolerance):
    (x, dx), (y, dy) = found
    assert torch.allclose(x, y, rtol=tolerance, atol=tolerance) and x > 0.01
    for one, other in zip(dx, dy, strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize(
    "settings", [{}, {"margin": 0.1}, {"contrast_anchors": False}, {"contrast_positives": False, "margin": -0.1}]
)
@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("guided", [True, False])
def test_value_and_gradients_equal_the_matrix_products(monkeypatch, settings, negatives, guided):
    if not guided and "margin" in settings:
        settings = {k: v for k, v in settings.items() if k != "margin"}
    b = 70  # more than one tile, and no multiple of it
    columns = draw(0, (b, 40), (b, 40), *([(b, negatives, 40)] if negatives else []))
    guide = draw(1, (b, 24), (b, 24), *([(b, negatives, 24)] if negatives else [])) if guided else None
    close(both(monkeypatch, columns, guide, **settings), 2e-5)


def test_gathered_candidates_with_an_offset_and_rows(monkeypatch):
    columns, guide = draw(2, (20, 40), (80, 40), (20, 40)), draw(3, (20, 24), (80, 24), (20, 24))
    close(both(monkeypatch, columns, guide, anchor_offset=40, rows=(5, 18)), 2e-5)


def test_equal_texts_never_act_as_negatives(monkeypatch):
    columns, guide = draw(4, (12, 16), (12, 16), (12, 16)), draw(5, (12, 8), (12, 8), (12, 8))
    ids = (torch.arange(12) // 2, torch.arange(12) + 100, torch.arange(12) + 105)
    close(both(monkeypatch, columns, guide, text_ids=ids), 2e-5)
    same = torch.zeros(12, dtype=torch.int64)
    assert abs(float(both(monkeypatch, columns, guide, text_ids=(same, same, same))[0][0])) < 1e-5


def test_every_negative_removed_leaves_a_loss_of_zero(monkeypatch):
    columns, guide = draw(6, (9, 16), (9, 16)), draw(7, (9, 8), (9, 8))
    found = both(monkeypatch, columns, guide, margin=5.0)
    assert all(abs(float(value)) < 1e-5 and all(torch.isfinite(g).all() for g in grads) for value, grads in found)


def test_half_precision_inputs_are_multiplied_as_they_come(monkeypatch):
    columns, guide = draw(8, (66, 48), (66, 48), (66, 48)), draw(9, (66, 24), (66, 24), (66, 24))
    close(both(monkeypatch, columns, guide, dtype=torch.float16), 1e-2)
