"""GISTEmbed's guided contrastive loss (arXiv 2402.16829), exact and linear in memory.

For row i, with student cosines s, guide cosines g, own pair (q_i, p_i) and temperature tau:

    loss_i = -s(q_i,p_i)/tau + log sum_c exp(s_c/tau)

The sum runs over four blocks of candidates: q_i-p_j, q_i-n_j, q_i-q_j and p_i-p_j. A candidate is
removed when the guide finds it more alike than the own pair: g_c > t_i, where t_i = g(q_i,p_i) - margin
("absolute") or t_i = g(q_i,p_i) - |g(q_i,p_i)| * margin ("relative"). Equality is not removed. The own
positive is always kept, the two diagonals q_i-q_i and p_i-p_i never count.

Rows are handled in blocks; the B x B matrix is never held. The gradient of a log-sum-exp is a
softmax, so it is accumulated in the same pass that computes the value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

STRATEGIES = ("absolute", "relative")
_BLOCK_ELEMENTS = 1 << 22  # entries of one block of similarities: 16 MB in float32


@dataclass
class _Side:
    """Unit rows of one encoder: anchors (B, D), positives (C, D), negatives (M, D) or None."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor | None


def _flat_negatives(negatives: Tensor | Sequence[Tensor] | None, rows: int, name: str) -> Tensor | None:
    """(B, D), (B, K, D) or a list of (B, D) -> (M, D); every negative is a candidate of every anchor."""
    if negatives is None:
        return None
    if not isinstance(negatives, Tensor):
        if not negatives:
            return None
        negatives = torch.stack(list(negatives), dim=1)
    if negatives.dim() not in (2, 3) or negatives.shape[0] != rows:
        raise ValueError(
            f"{name}: shape {tuple(negatives.shape)}, expected ({rows}, D) or ({rows}, K, D); one row of negatives an anchor"
        )
    return negatives.reshape(-1, negatives.shape[-1])


def _check(a: Tensor, p: Tensor, n: Tensor | None, offset: int, prefix: str) -> None:
    for name, t in ((f"{prefix}anchors", a), (f"{prefix}positives", p)):
        if t.dim() != 2:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected two dimensions (rows, D)")
    if a.shape[1] != p.shape[1] or (n is not None and n.shape[1] != a.shape[1]):
        shapes = [tuple(t.shape) for t in (a, p, n) if t is not None]
        raise ValueError(f"{prefix}embeddings: dimensions differ, shapes {shapes}; encode all columns with one model")
    if a.shape[0] == 0:
        raise ValueError(f"{prefix}anchors: no rows; give at least one pair")
    if offset < 0 or offset + a.shape[0] > p.shape[0]:
        raise ValueError(
            f"{prefix}positives: {p.shape[0]} rows, but {a.shape[0]} anchors from offset {offset} need "
            f"{offset + a.shape[0]}; each anchor needs its own positive"
        )


def _unit(t: Tensor, name: str) -> Tensor:
    """Rows of length one, in at least float32 (a zero row stays zero)."""
    if not bool(torch.isfinite(t).all()):
        raise ValueError(f"{name}: holds values that are not finite; check the encoder (float16 overflows at 65504)")
    t = t if t.dtype == torch.float64 else t.float()
    length = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
    # A zero row gets a zero gradient; F.normalize would give it 1e12, which float16 turns into inf.
    return torch.where(length > 1e-12, t / length.clamp_min(1e-12), torch.zeros_like(t))


@dataclass
class _Plan:
    """Everything but the student's embeddings: guide rows, thresholds, identities, switches."""

    guide: _Side | None
    threshold: Tensor | None
    ids: tuple[Tensor, Tensor, Tensor | None] | None
    offset: int
    temperature: float
    contrast_anchors: bool
    contrast_positives: bool

    def removed(self, block: str, rows: slice) -> Tensor | None:
        """Boolean (rows, candidates): which candidates of this block do not count."""
        out: Tensor | None = None
        if self.guide is not None and self.threshold is not None:
            g = self.guide
            left, right = {
                "ap": (g.anchors, g.positives),
                "an": (g.anchors, g.negatives),
                "aa": (g.anchors, g.anchors),
                "pp": (g.positives[self.offset :], g.positives),
            }[block]
            assert right is not None
            out = left[rows] @ right.T > self.threshold[rows, None]
        if self.ids is not None:
            a, p, n = self.ids
            own_a, own_p = a[rows, None], p[self.offset :][rows, None]
            right_ids = {"ap": p, "an": n, "aa": a, "pp": p}[block]
            assert right_ids is not None
            same = (right_ids[None] == own_a) | (right_ids[None] == own_p)
            out = same if out is None else out | same
        return out


def _blocks(plan: _Plan, has_negatives: bool) -> list[str]:
    names = ["ap"]
    if has_negatives:
        names.append("an")
    if plan.contrast_anchors:
        names.append("aa")
    if plan.contrast_positives:
        names.append("pp")
    return names


class _Blockwise(torch.autograd.Function):
    """Sum of loss_i over rows. Value and gradient come from one pass over blocks of rows."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, p: Tensor, n: Tensor | None, plan: _Plan, block_size: int | None) -> Tensor:
        want = any(ctx.needs_input_grad[:3])
        grads = [torch.zeros_like(t) if want and t is not None else None for t in (a, p, n)]
        da, dp, dn = grads
        rows_total, names = a.shape[0], _blocks(plan, n is not None)
        size = {"ap": p.shape[0], "an": 0 if n is None else n.shape[0], "aa": rows_total, "pp": p.shape[0]}
        width = sum(size[k] for k in names)
        step = block_size or max(1, min(rows_total, _BLOCK_ELEMENTS // width))
        own_p = p[plan.offset : plan.offset + rows_total]
        total = a.new_zeros(())
        for start in range(0, rows_total, step):
            rows = slice(start, min(start + step, rows_total))
            index = torch.arange(rows.stop - rows.start, device=a.device)
            own = index + start
            left = {"ap": a[rows], "an": a[rows], "aa": a[rows], "pp": own_p[rows]}
            right: dict[str, Any] = {"ap": p, "an": n, "aa": a, "pp": p}
            logits = a.new_empty((len(index), width))
            at, columns = 0, {}
            for name in names:
                part = logits[:, at : at + size[name]]
                torch.mm(left[name], right[name].T, out=part)
                part.mul_(1.0 / plan.temperature)
                gone = plan.removed(name, rows)
                if name == "ap":
                    if gone is not None:
                        gone[index, own + plan.offset] = False  # the own positive is always kept
                elif name in ("aa", "pp"):
                    if gone is None:
                        gone = torch.zeros_like(part, dtype=torch.bool)
                    gone[index, own + (plan.offset if name == "pp" else 0)] = True
                if gone is not None:
                    part.masked_fill_(gone, float("-inf"))
                columns[name] = slice(at, at + size[name])
                at += size[name]
            target = logits[index, own + plan.offset].clone()
            lse = torch.logsumexp(logits, dim=1)
            total += (lse - target).sum()
            if not want:
                continue
            weight = logits.sub_(lse[:, None]).exp_()  # softmax; removed candidates are exactly 0
            weight[index, own + plan.offset] -= 1.0
            weight.mul_(1.0 / plan.temperature)
            assert da is not None and dp is not None
            for name in names:
                w = weight[:, columns[name]]
                lhs, rhs = left[name], right[name]
                if name == "pp":
                    dp[plan.offset + rows.start : plan.offset + rows.stop] += w @ rhs
                else:
                    da[rows] += w @ rhs
                target_grad: Any = {"ap": dp, "an": dn, "aa": da, "pp": dp}[name]
                target_grad.addmm_(w.T, lhs)
        ctx.save_for_backward(*[g for g in grads if g is not None])
        ctx.has_n = n is not None
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        g = upstream[0]
        saved = [t * g for t in ctx.saved_tensors]
        return saved[0], saved[1], saved[2] if ctx.has_n else None, None, None


def guided_contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | Sequence[Tensor] | None = None,
    *,
    guide_anchors: Tensor | None = None,
    guide_positives: Tensor | None = None,
    guide_negatives: Tensor | Sequence[Tensor] | None = None,
    temperature: float = 0.01,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    text_ids: tuple[Tensor, Tensor, Tensor | None] | None = None,
    anchor_offset: int = 0,
    block_size: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of the module's docstring, on embeddings.

    Args:
        anchors: (B, D). positives: (C, D), C >= B; the positive of anchor i is row `anchor_offset + i`
            (more candidates than anchors when they are gathered from other processes).
        negatives: (B, D), (B, K, D), a list of (B, D), or None.
        guide_*: the same texts encoded by the guide, of any dimension. All None: no guide, that is
            InfoNCE over the same four blocks (the original's loss id 10).
        temperature: tau. margin, margin_strategy: see the module's docstring.
        text_ids: integer ids of the anchors' (B), positives' (C) and negatives' (M) texts; a candidate
            with the id of the anchor or of its positive never acts as a negative.
        block_size: rows at a time; default bounds a block of similarities to 16 MB.
        reduction: "mean" or "sum" over anchors.

    Returns a scalar. Raises ValueError naming the argument, the shapes and the remedy.
    """
    if margin_strategy not in STRATEGIES:
        raise ValueError(f"margin_strategy {margin_strategy!r}: unknown; use one of {', '.join(STRATEGIES)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: unknown; use mean or sum")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    flat = _flat_negatives(negatives, anchors.shape[0], "negatives")
    _check(anchors, positives, flat, anchor_offset, "")
    plan = _make_plan(
        (anchors, positives, flat),
        (guide_anchors, guide_positives, guide_negatives),
        temperature,
        margin,
        margin_strategy,
        contrast_anchors,
        contrast_positives,
        text_ids,
        anchor_offset,
    )
    a, p = _unit(anchors, "anchors"), _unit(positives, "positives")
    n = None if flat is None else _unit(flat, "negatives")
    total = _Blockwise.apply(a, p, n, plan, block_size)
    return total / anchors.shape[0] if reduction == "mean" else total


def _make_plan(
    student: tuple[Tensor, Tensor, Tensor | None],
    guide: tuple[Tensor | None, Tensor | None, Tensor | Sequence[Tensor] | None],
    temperature: float,
    margin: float,
    strategy: str,
    contrast_anchors: bool,
    contrast_positives: bool,
    text_ids: tuple[Tensor, Tensor, Tensor | None] | None,
    offset: int,
) -> _Plan:
    a, p, n = student
    ga, gp, gn = guide
    side, threshold = None, None
    if ga is not None or gp is not None:
        if ga is None or gp is None or (n is not None and gn is None):
            raise ValueError(
                "guide embeddings: some are missing; give guide_anchors, guide_positives and, with negatives, guide_negatives"
            )
        flat = _flat_negatives(gn, a.shape[0], "guide_negatives")
        _check(ga, gp, flat, offset, "guide_")
        for name, s, g in (("anchors", a, ga), ("positives", p, gp), ("negatives", n, flat)):
            if s is not None and (g is None or s.shape[0] != g.shape[0]):
                got = None if g is None else tuple(g.shape)
                raise ValueError(f"guide_{name}: shape {got}, but {name} {tuple(s.shape)}; encode the same rows with the guide")
        with torch.no_grad():
            dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
            side = _Side(
                _unit(ga, "guide_anchors").to(a.device, dtype),
                _unit(gp, "guide_positives").to(a.device, dtype),
                None if flat is None else _unit(flat, "guide_negatives").to(a.device, dtype),
            )
            own = (side.anchors * side.positives[offset : offset + a.shape[0]]).sum(1)
            threshold = own - margin if strategy == "absolute" else own - own.abs() * margin
            # A dot product by sum and one by matrix product differ in the last bits; an exact tie
            # (a duplicate of the own positive) must not be removed by rounding.
            threshold = threshold + 8 * torch.finfo(dtype).eps
    if text_ids is not None:
        ids_a, ids_p, ids_n = text_ids
        rows = (a.shape[0], p.shape[0], None if n is None else n.shape[0])
        count = (len(ids_a), len(ids_p), None if ids_n is None else ids_n.numel())
        if rows != count:
            raise ValueError(f"text_ids: {count} ids for {rows} rows of anchors, positives, negatives; give one id a row")
        text_ids = (ids_a, ids_p, None if ids_n is None else ids_n.reshape(-1))
    return _Plan(side, threshold, text_ids, offset, temperature, contrast_anchors, contrast_positives)


@dataclass
class MaskView:
    """What the guide removed from a batch: per block a boolean and a guide-similarity matrix, and the thresholds."""

    removed: dict[str, Tensor]
    similarity: dict[str, Tensor]
    threshold: Tensor


def false_negative_mask(
    guide_anchors: Tensor,
    guide_positives: Tensor,
    guide_negatives: Tensor | Sequence[Tensor] | None = None,
    *,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
) -> MaskView:
    """The mask of a small batch, for looking at: own pairs are never removed, diagonals are not counted.

    Blocks "ap", "aa", "pp" (B, B) and, with negatives, "an" (B, M).
    """
    flat = _flat_negatives(guide_negatives, guide_anchors.shape[0], "guide_negatives")
    plan = _make_plan(
        (guide_anchors, guide_positives, flat),
        (guide_anchors, guide_positives, flat),
        1.0,
        margin,
        margin_strategy,
        True,
        True,
        None,
        0,
    )
    assert plan.guide is not None and plan.threshold is not None
    g, everything = plan.guide, slice(0, guide_anchors.shape[0])
    pairs = {"ap": (g.anchors, g.positives), "aa": (g.anchors, g.anchors), "pp": (g.positives, g.positives)}
    if g.negatives is not None:
        pairs["an"] = (g.anchors, g.negatives)
    removed, similarity = {}, {}
    for name, (x, y) in pairs.items():
        similarity[name] = x @ y.T
        gone = plan.removed(name, everything)
        assert gone is not None
        if name != "an":
            gone.fill_diagonal_(False)
        removed[name] = gone
    return MaskView(removed, similarity, plan.threshold)


# --- sentence-transformers ----------------------------------------------------------------------


class GuideCache:
    """Guide embeddings, computed once per distinct text; optionally kept on disk by guide digest.

    The guide is frozen and in eval mode, and reads the raw text: neither the student's prompt nor its
    length limit reaches it.
    """

    def __init__(self, guide: Any, path: Path | None = None, batch_size: int = 64):
        self.guide = guide.eval().requires_grad_(False)
        self.batch_size = batch_size
        self._rows: dict[str, int] = {}
        self._table = np.zeros((0, 0), np.float32)
        self._file: Path | None = None
        if path is not None:
            self._file = path / f"guide-{self._digest()}.npz"
            if self._file.is_file():
                with np.load(self._file, allow_pickle=False) as data:
                    self._table = data["table"]
                    self._rows = {str(k): i for i, k in enumerate(data["keys"])}

    def _digest(self) -> str:
        h = hashlib.sha256()
        for name, value in sorted(self.guide.state_dict().items()):
            h.update(name.encode())
            h.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return h.hexdigest()[:16]

    @staticmethod
    def _key(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    def add(self, texts: Sequence[str]) -> None:
        """Embed the texts that are not known yet, and write the table if it is kept on disk."""
        new = list(dict.fromkeys(t for t in texts if self._key(t) not in self._rows))
        if not new:
            return
        with torch.no_grad():
            vectors = self.guide.encode(new, batch_size=self.batch_size, convert_to_numpy=True, show_progress_bar=False)
        vectors = np.asarray(vectors, np.float32)
        self._rows.update({self._key(t): len(self._rows) + i for i, t in enumerate(new)})
        self._table = np.concatenate([self._table, vectors]) if len(self._table) else vectors
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(".tmp.npz")
            np.savez(temporary, table=self._table, keys=np.array(list(self._rows)))
            temporary.replace(self._file)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), D) float32 embeddings."""
        self.add(texts)
        return torch.from_numpy(self._table[[self._rows[self._key(t)] for t in texts]])


class GuidedCollator:
    """Wraps the trainer's collator and adds guide embeddings and text ids of each text column to the batch.

    `guide_text` turns a training text into what the guide reads (to take an instruction off again).
    """

    def __init__(self, inner: Any, cache: GuideCache | None, guide_text: Callable[[str], str] = lambda t: t):
        self.inner, self.cache, self.guide_text = inner, cache, guide_text

    # The trainer sets and reads settings on its collator (prompts, label columns, ...): hand them through.
    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        texts = {name: [self.guide_text(str(f[name])) for f in features] for name, v in features[0].items() if isinstance(v, str)}
        batch: dict[str, Any] = self.inner(features)
        ids = {t: i for i, t in enumerate(dict.fromkeys(t for column in texts.values() for t in column))}
        for name, column in texts.items():
            batch[f"{name}_text_id"] = torch.tensor([ids[t] for t in column])
            if self.cache is not None:
                batch[f"{name}_guide_embedding"] = self.cache(column)
        return batch


class GuidedContrastiveLoss(torch.nn.Module):
    """The loss as a drop-in for `SentenceTransformerTrainer`, with any number of negative columns.

    Use it with `GuidedCollator`, which holds the guide; so the guide is in nobody's parameters,
    optimizer or state dict. Columns: anchor, positive, negatives. `guided=False` leaves the guide out.
    """

    def __init__(
        self,
        model: Any,
        *,
        guided: bool = True,
        temperature: float = 0.01,
        margin: float = 0.0,
        margin_strategy: str = "absolute",
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
    ):
        super().__init__()
        self.model = model
        self.guided = guided
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "margin": margin,
            "margin_strategy": margin_strategy,
            "contrast_anchors": contrast_anchors,
            "contrast_positives": contrast_positives,
        }

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        columns, guides, ids = [], [], []
        for features in sentence_features:
            own = dict(features)
            guides.append(own.pop("guide_embedding", None))
            ids.append(own.pop("text_id", None))
            columns.append(self.model(own)["sentence_embedding"])
        if self.guided and any(g is None for g in guides):
            raise ValueError("guide embeddings: missing from the batch; wrap the trainer's data_collator in GuidedCollator")
        use_ids = all(i is not None for i in ids)
        device = columns[0].device
        text_ids = None
        if use_ids:
            negative_ids = torch.stack(ids[2:], dim=1).reshape(-1).to(device) if len(ids) > 2 else None
            text_ids = (ids[0].to(device), ids[1].to(device), negative_ids)
        g: list[Any] = guides if self.guided else [None] * len(columns)
        return guided_contrastive_loss(
            columns[0],
            columns[1],
            columns[2:] or None,
            guide_anchors=g[0],
            guide_positives=g[1],
            guide_negatives=g[2:] or None if self.guided else None,
            text_ids=text_ids,
            **self.settings,
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {"guided": self.guided, **self.settings}
