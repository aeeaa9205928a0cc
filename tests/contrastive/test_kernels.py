"""The Triton kernels against the path in plain PyTorch, under Triton's interpreter on the CPU.

Collected only when TRITON_INTERPRET=1 is set before Python starts (`make test` does), since Triton reads it on import.
The interpreter has no bfloat16 products; that type needs a GPU (`benchmarks/guided_loss.py --device cuda`).
"""

import pytest
import torch
import triton  # noqa: F401  without it both sides would be the same path

from speed_core.contrastive import guided_loss
from speed_core.contrastive.guided_loss import guided_contrastive_loss, unguided_contrastive_loss
from speed_core.contrastive.loss_inputs import LossSettings
from speed_core.contrastive.triton_kernels import part_width


def both(monkeypatch, columns, guide, dtype=torch.float32, text_ids=None, rows=None, **settings):
    """(value, gradients) by the kernels and by matrix products."""
    out = []
    for kernels in (True, False):
        with monkeypatch.context() as patch:
            if not kernels:
                patch.setattr(guided_loss, "_kernel_dtype", lambda given, unit: None)
            assert (guided_loss._kernel_dtype([torch.zeros(1, dtype=dtype)], torch.zeros(1)) is not None) == kernels
            leaves = [c.to(dtype).requires_grad_() for c in columns]
            given = (leaves, guide) if guide else (leaves,)
            how = LossSettings(temperature=0.05, **settings)
            loss = (guided_contrastive_loss if guide else unguided_contrastive_loss)(*given, how, text_ids=text_ids, rows=rows)
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
    "settings",
    [
        {},
        {"margin": 0.1},
        {"margin": 0.3, "margin_strategy": "relative"},
        {"contrast_anchors": False},
        {"contrast_positives": False, "margin": -0.1},
        {"contrast_anchors": False, "contrast_positives": False},
    ],
)
@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("guided", [True, False])
def test_value_and_gradients_equal_the_matrix_products(monkeypatch, settings, negatives, guided):
    if not guided and "margin" in settings:
        settings = {k: v for k, v in settings.items() if not k.startswith("margin")}
    b = 70  # more than one tile, and no multiple of it
    columns = draw(0, (b, 40), (b, 40), *([(b, negatives, 40)] if negatives else []))
    guide = draw(1, (b, 24), (b, 24), *([(b, negatives, 24)] if negatives else [])) if guided else None
    close(both(monkeypatch, columns, guide, **settings), 2e-5)


def test_some_rows_of_gathered_columns(monkeypatch):
    columns, guide = draw(2, (80, 40), (80, 40), (80, 40)), draw(3, (80, 24), (80, 24), (80, 24))
    close(both(monkeypatch, columns, guide, rows=(45, 78)), 2e-5)


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


def test_zero_rows_and_exact_ties_and_extreme_lengths_give_what_the_matrix_products_give(monkeypatch):
    columns, guide = draw(10, (12, 16), (12, 16), (12, 16)), draw(11, (12, 8), (12, 8), (12, 8))
    columns[0][0] = columns[1][0] = columns[2][3] = guide[0][2] = guide[1][5] = 0
    columns[0][1], columns[1][2] = columns[0][1] * 1e20, columns[1][2] * 1e-20
    guide[1][7], guide[2][8] = guide[1][6], guide[1][6]  # a duplicate of the own positive of row 6: equal, so kept
    close(found := both(monkeypatch, columns, guide), 2e-5)
    assert all(bool(torch.isfinite(g).all()) for _, grads in found for g in grads)


@pytest.mark.parametrize("negatives", [0, 1])
def test_one_pair_alone(monkeypatch, negatives):
    columns, guide = (draw(i, (1, 16), (1, 16), *[(1, 16)] * negatives) for i in (12, 13))
    columns[-1] = -columns[0] if not negatives else columns[0] + 0.5
    guide[-1] = -guide[0] if negatives else guide[0]  # the negative is kept
    (x, dx), (y, dy) = both(monkeypatch, columns, guide)
    assert torch.allclose(x, y, atol=1e-5) and (x > 0.01) == bool(negatives)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(dx, dy, strict=True))


@pytest.mark.parametrize("mixed", ["student", "guide"])
def test_half_precision_needs_all_operands_so_mixed_ones_lose_nothing(monkeypatch, mixed):
    columns, guide = draw(14, (20, 16), (20, 16)), draw(15, (20, 8), (20, 8))
    # Candidate 1 is more like anchor 0 than its own positive by less than float16 can tell near 0.7.
    guide[0][0] = torch.eye(8)[0]
    for row, cosine in ((0, 0.7), (1, 0.7001)):
        guide[1][row] = cosine * torch.eye(8)[0] + (1 - cosine**2) ** 0.5 * torch.eye(8)[1]
    columns[1][1] = columns[0][0]  # and the student would pay for it
    side = columns if mixed == "student" else guide
    side[0] = side[0].half()
    values = []
    for kernels in (True, False):
        with monkeypatch.context() as patch:
            if not kernels:
                patch.setattr(guided_loss, "_kernel_dtype", lambda given, unit: None)
            values.append(guided_contrastive_loss(columns, guide, LossSettings(temperature=0.05)))
    assert torch.allclose(*values, rtol=1e-6, atol=1e-6) and values[0] > 0.01


def test_integers_of_two_bytes_are_no_half_precision():
    rows = [torch.eye(3, dtype=torch.int16)] * 2
    assert guided_loss._common_half(rows) == torch.float32
    assert guided_loss._common_half([t.half() for t in rows]) == torch.float16
    assert guided_loss._common_half([rows[0].half(), rows[1].bfloat16()]) == torch.float32


def test_a_part_of_the_gradients_is_a_power_of_two_of_at_most_512_bytes(monkeypatch):
    wanted = {(5, 2): 16, (40, 4): 64, (384, 4): 128, (200, 2): 256, (384, 2): 256, (4096, 2): 256}
    assert {k: part_width(*k) for k in wanted} == wanted
    for width, dtype, tolerance in ((5, torch.float32, 2e-5), (200, torch.float32, 2e-5), (300, torch.float16, 1e-2)):
        columns, guide = draw(16, (10, width), (10, width)), draw(17, (10, 8), (10, 8))
        close(both(monkeypatch, columns, guide, dtype=dtype), tolerance)
