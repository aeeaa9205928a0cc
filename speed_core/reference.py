"""The papers' equations and the rules that this repository adds, each as short as it can be read. Tests hold the fast code equal to them.

Shapes: B texts in a batch, T tokens in a row, D dimensions, N texts of an evaluation task, S training seeds.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def truncate_topic(path: str, levels: int = 4) -> str:
    """A topic path without its middle levels (SPEED section 3.2.1).

    Of six levels the paper keeps the first two and the last two.
    """
    parts = path.split("/")
    if len(parts) <= levels:
        return path
    first = (levels + 1) // 2
    last = levels - first
    return "/".join(parts[:first] + (parts[-last:] if last else []))


def completion_loss(logits: Tensor, input_ids: Tensor, is_completion: Tensor) -> Tensor:
    """SPEED's Eq. 1: the mean negative log-probability of the completion's tokens.

    `logits` (B, T, V), `input_ids` (B, T), `is_completion` (B, T).
    The logits at token t predict token t + 1. Tokens of the prompt do not count.
    """
    log_probs = logits[:, :-1].log_softmax(-1)
    of_next = log_probs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return -of_next[is_completion[:, 1:]].mean()


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """SPEED's Eq. 2, the loss of direct preference optimization, of each pair.

    Each argument (B,) holds log-probabilities of whole completions: under the model that is
    trained (`policy`), and under the junior that it started from (`reference`).
    arXiv 2305.18290, Eq. 7.
    """
    chosen_reward = beta * (policy_chosen - reference_chosen)
    rejected_reward = beta * (policy_rejected - reference_rejected)
    return -torch.nn.functional.logsigmoid(chosen_reward - rejected_reward)


def shared_prompt_mask(segment_ids: Tensor) -> Tensor:
    """(T, T): may the token of the row attend to the token of the column?

    The tokens are `[prompt | completion 1 | completion 2]`; `segment_ids` (T,) is 0 for the
    prompt and k for completion k. A completion sees the prompt and itself, and no other completion.
    """
    not_later = torch.ones(len(segment_ids), len(segment_ids), dtype=torch.bool).tril()
    of_prompt = segment_ids[None, :] == 0
    of_same_segment = segment_ids[None, :] == segment_ids[:, None]
    return not_later & (of_prompt | of_same_segment)


def last_token_pooling(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, D) unit vectors: the hidden state (B, T, D) at the last token before the padding."""
    last = attention_mask.sum(dim=1) - 1
    return torch.nn.functional.normalize(hidden[torch.arange(len(hidden)), last], dim=1)


def mean_pooling(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, D) unit vectors: the mean of a text's hidden states (B, T, D), its padding left out, as in MiniLM."""
    kept = hidden * attention_mask[:, :, None]
    mean = kept.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=1)


def info_nce(
    queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float = 0.02
) -> Tensor:  # fmt: skip
    """E5-mistral's contrastive loss, which SPEED keeps.

    Each query (B, D) has to find its positive (B, D) among all positives and all negatives
    (M, D) of the batch. All are unit vectors.
    """
    similarity = queries @ torch.cat([positives, negatives]).T / temperature
    return torch.nn.functional.cross_entropy(similarity, torch.arange(len(queries)))


def guide_mask(guide_similarity: Tensor, margin: float = 0.0) -> Tensor:
    """GISTEmbed's mask: True where the guide says that a candidate is not a negative.

    `guide_similarity` (B, C) holds the guide's cosine of query i with candidate j. Candidate i
    is the positive of query i; whatever is nearer to the query than that is removed.
    """
    own = guide_similarity.diagonal()[:, None]
    return guide_similarity > own - margin


def guided_loss(
    queries: Tensor, positives: Tensor,
    guide_queries: Tensor, guide_positives: Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    """GISTEmbed's loss of pairs (arXiv 2402.16829), from unit vectors of model and guide.

    Candidates of query i are the positives, the other queries, and, compared with
    positive i, the other positives. The query's own positive always stays.
    """
    size, own = len(queries), torch.eye(len(queries), dtype=torch.bool)
    threshold = (guide_queries * guide_positives).sum(1, keepdim=True)
    blocks = []
    for left, right, guide_left, guide_right in (
        (queries, positives, guide_queries, guide_positives),
        (queries, queries, guide_queries, guide_queries),
        (positives, positives, guide_positives, guide_positives),
    ):
        removed = guide_left @ guide_right.T > threshold
        removed = removed & ~own if left is not right else removed | own
        blocks.append((left @ right.T / temperature).masked_fill(removed, -torch.inf))
    return torch.nn.functional.cross_entropy(torch.cat(blocks, dim=1), torch.arange(size))


def jaccard(one: str, other: str, size: int = 3) -> float:
    """The share of all runs of `size` words that both texts have; near-duplicates share most of them."""
    words = one.lower().split(), other.lower().split()
    a, b = ({tuple(w[i : i + size]) for i in range(len(w) - size + 1)} for w in words)
    return len(a & b) / len(a | b)


def minhash(text: str, count: int = 128, size: int = 3) -> list[int]:
    """For each of `count` random hash functions, the smallest hash of any run of `size` words.

    Two texts agree on one of these numbers with a probability that equals their `jaccard`.
    """
    words = text.lower().split()
    runs = [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]

    def hashed(function: int, run: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{function} {run}".encode(), digest_size=8).digest(), "big")

    return [min(hashed(k, run) for run in runs) for k in range(count)]


def ndcg(relevant_ranks: list[int], cutoff: int = 10) -> float:
    """nDCG@cutoff of one query: 1 where its relevant documents stand first. Ranks begin at 1."""
    gain = sum(1 / math.log2(rank + 1) for rank in relevant_ranks if rank <= cutoff)
    ideal = range(1, min(len(relevant_ranks), cutoff) + 1)
    return gain / sum(1 / math.log2(rank + 1) for rank in ideal)


def interval(scores: Tensor, draws: int = 1000, critical: float = 1.96) -> tuple[float, float]:
    """(low, high) of the mean of `scores` (S, N).

    Seeds and texts are both samples, so their variances add up. The same texts are drawn
    again for all seeds. `critical` is Student's t for the seeds' degrees of freedom.
    """
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(scores.shape[1], (draws, scores.shape[1]), generator=generator)
    of_texts = scores.mean(0)[picks].mean(1).var(correction=0)
    of_seeds = scores.mean(1).var() / len(scores)
    half = critical * (of_texts + of_seeds).sqrt()
    mean = scores.mean()
    return float(mean - half), float(mean + half)
