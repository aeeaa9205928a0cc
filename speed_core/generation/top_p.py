"""Nucleus (top-p) filtering without sorting the vocabulary.

The usual way sorts all logits of every row at every step. With a vocabulary of 262,144 words that is most of the time
of a small model on a CPU: 0.79 s for 64 rows, where the few hundred largest logits take 0.014 s. The nucleus is nearly
always among those; where it is not, that row is sorted after all, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

CANDIDATES = (256, 4096)  # logits looked at before a row is sorted
PIECE = 512  # logits added up at a time in `log_mass`


def log_mass(logits: torch.Tensor) -> torch.Tensor:
    """log sum exp of each row (rows, 1), in float32, the same bits whatever the number of threads.

    PyTorch adds up one long row in as many parts as there are threads, and the last bits differ with them: enough to move a token
    over the edge of the nucleus. So pieces are added up first, each by one thread.
    """
    whole = logits.shape[-1] // PIECE * PIECE
    head, tail = logits[:, :whole].float(), logits[:, whole:].float()
    pieces = [torch.logsumexp(head.unflatten(-1, (-1, PIECE)), -1)] if whole else []
    pieces += [torch.logsumexp(tail, -1, keepdim=True)] if tail.shape[-1] else []
    return torch.logsumexp(torch.cat(pieces, -1), -1, keepdim=True)


def top_p_filter(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Logits (rows, vocabulary) with everything outside the nucleus at -inf, in place: another tensor of 64 rows costs as much as
    everything else that is done here.

    The nucleus is the smallest set of most probable tokens whose probability is at least p (Holtzman et al. 2020): a
    token stays when those that are more probable than it hold less than p together. The most probable always stays.
    """
    if p >= 1:
        return logits
    # On a CPU row by row, so that what `logsumexp` writes on its way stays in the cache: 22 ms instead of 51 for 64 rows.
    parts = logits.split(1 if logits.device.type == "cpu" else len(logits))
    mass = torch.cat([log_mass(part) for part in parts])
    rows = torch.arange(len(logits), device=logits.device)
    rest = logits  # the rows that are not done yet
    kept = []
    for k in (*CANDIDATES, logits.shape[-1]):
        k = min(k, logits.shape[-1])
        values, tokens = rest.topk(k, sorted=True)
        probability = torch.exp(values.float() - mass[rows])
        total = probability.cumsum(-1)
        keep = total - probability < p
        keep[:, 0] = True
        done = (total[:, -1] >= p) | (k == logits.shape[-1])
        kept.append((rows[done], tokens[done], values[done].masked_fill(~keep[done], -torch.inf)))
        rows = rows[~done]
        if not len(rows):
            break
        rest = logits[rows]
    logits.fill_(-torch.inf)
    for where, tokens, values in kept:
        logits[where[:, None], tokens] = values
    return logits


class TopPFilter(LogitsProcessor):
    """`top_p_filter` for Transformers' `generate` (to be used with top_p left at 1)."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return top_p_filter(scores, self.p)


class SeededNoise(LogitsProcessor):
    """Sampling for Transformers' `generate` (the last processor, with do_sample=False): Gumbel noise that depends on the seed of a row,
    the step and the token alone, so that a text depends on its own seed and not on the rest of the batch.

    The largest of log p_i - log E_i with E_i exponentially distributed is token i with probability p_i.
    """

    def __init__(self, seeds: Sequence[int]):
        self.seeds = torch.tensor(seeds, dtype=torch.int64)
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        streams = split_mix(self.seeds.to(scores.device)) + self.step
        self.step += 1
        rows, tokens = (scores > -torch.inf).nonzero(as_tuple=True)
        uniform = uniforms(split_mix(streams)[rows] + tokens)
        scores[rows, tokens] -= torch.log(-torch.log(uniform)).to(scores.dtype)
        return scores


def split_mix(counter: torch.Tensor) -> torch.Tensor:
    """A random whole number for each of `counter` (int64, any shape): SplitMix64's output for that state (Steele, Lea and Flood 2014).

    Only what is wanted is drawn: a few hundred possible tokens of 262,144, where a generator draws them all, 2.4 ms a row.
    """
    x = counter * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _right(x, shift)) * _signed(factor)
    return x ^ _right(x, 31)


def uniforms(counter: torch.Tensor) -> torch.Tensor:
    """A number above 0 and below 1, in float64, for each of `counter` (int64)."""
    return (_right(split_mix(counter), 11).double() + 0.5) / 2**53


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _right(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Right shift that brings in zeros; torch's repeats the sign."""
    return (x >> shift) & ((1 << 64 - shift) - 1)


def vllm_processor() -> Any:
    """`top_p_filter` as a logits processor class of vLLM; its attribute `p` holds for all requests of a job (with top_p left at 1).

    It does not change the most probable token, so vLLM applies it after the temperature, where its own top-p stands. With
    per-token noise (vLLM on the CPU) the sampled text is therefore the same as with vLLM's own.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor as VllmProcessor

    class TopP(VllmProcessor):
        p = 1.0

        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
            pass

        def is_argmax_invariant(self) -> bool:
            return True

        def update_state(self, batch_update: Any) -> None:
            pass

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return top_p_filter(logits, type(self).p)

    return TopP
