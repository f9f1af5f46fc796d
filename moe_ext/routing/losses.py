"""Auxiliary losses: they balance a router and keep its logits small.

Each is a mean over tokens, independent of their number. Losses that are linear in the tokens, as
`z_loss` and `load_balance_loss` with one load for all, average over equal micro-batches to the loss
of the whole batch. E experts, T tokens, K choices.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def expert_load(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Count how often each expert was chosen.

    Args:
        expert_ids: [..., T, K] ids, -1 for none
        num_experts: E

    Returns:
        [..., E] int64
    """
    # Bin 0 counts the -1.
    bins = expert_ids.flatten(-2).long() + 1
    load = torch.zeros(*bins.shape[:-1], num_experts + 1, dtype=torch.int64, device=bins.device)
    return load.scatter_add(-1, bins, torch.ones_like(bins))[..., 1:]


def shares(probs: Tensor) -> Tensor:
    """Divide every token's scores by their sum, for scores that do not sum to one.

    Args:
        probs: [..., E]
    """
    return probs / probs.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)


def load_balance_loss(
    importance: Tensor,
    load: Tensor,
    num_tokens: int | Tensor,
    choices: int,
    *,
    load_tokens: int | Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """E / choices * sum over e of importance[e] / T * load[e] / T; 1 where both are even.

    The loss of Switch Transformers (arXiv 2101.03961, eq. 4) for choices = 1, of the global batch
    as in arXiv 2501.11873.

    Args:
        importance: [..., E] sums of the tokens' probabilities, differentiable; leading dimensions,
            such as sequences, are averaged
        load: [..., E] how often each expert was chosen, counting `choices` choices per token
        num_tokens: T
        choices: choices per token that `load` counts
        load_tokens: tokens that `load` counts, where they are others, as a whole accumulated batch
        group: sum the load over its ranks. The mean of the ranks' losses is then the loss of the
            global batch, for any number of tokens on each, and the mean of the gradients, as
            DistributedDataParallel takes it, is its gradient.
    """
    if importance.shape != load.shape:
        raise RuntimeError(
            "load_balance_loss: importance and load must be [..., E] alike, got "
            f"{list(importance.shape)} and {list(load.shape)}"
        )
    load_tokens = num_tokens if load_tokens is None else load_tokens
    if group is not None:
        if load.dim() != 1:
            raise RuntimeError(
                f"load_balance_loss: load must be [E] with a group, got {list(load.shape)}"
            )
        one = load.new_ones(1, dtype=torch.int64)
        counts = torch.cat([load.long(), one * num_tokens, one * load_tokens])
        dist.all_reduce(counts, group=group)
        load = counts[:-2]
        num_tokens = counts[-2].clamp(min=1) / dist.get_world_size(group)
        load_tokens = counts[-1].clamp(min=1)
    else:
        num_tokens, load_tokens = _at_least_one(num_tokens), _at_least_one(load_tokens)
    E = importance.shape[-1]
    sequences = max(importance.numel() // E, 1)
    share = choices * sequences / E
    load = load.to(importance.dtype)
    if isinstance(load_tokens, Tensor):
        load = load / load_tokens / share
    else:
        load = load / (load_tokens * share)
    return (importance / num_tokens * load).sum()


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def sequence_balance_loss(probs: Tensor, expert_ids: Tensor, num_sequences: int) -> Tensor:
    """The load-balance loss within every sequence, averaged over the sequences.

    DeepSeek-V3's complementary loss (arXiv 2412.19437, eq. 17-20) without its factor alpha.

    Args:
        probs: [T, E] or [B, S, E], sequence after sequence; scores that do not sum to one need
            `shares(probs)`
        expert_ids: [T, K] or [B, S, K] int32, -1 for none
        num_sequences: B, a divisor of T
    """
    E, K = probs.shape[-1], expert_ids.shape[-1]
    tokens = probs.numel() // E
    if num_sequences < 1 or tokens % num_sequences:
        raise RuntimeError(
            f"sequence_balance_loss: num_sequences must divide T = {tokens}, got {num_sequences}"
        )
    probs = probs.reshape(num_sequences, -1, E)
    load = expert_load(expert_ids.reshape(num_sequences, -1, K), E)
    return load_balance_loss(probs.sum(dim=1), load, probs.shape[1], K)


def z_loss(logits: Tensor) -> Tensor:
    """The mean over tokens of logsumexp(logits) ** 2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        logits: [..., E]
    """
    sums = logits.logsumexp(dim=-1)
    return sums.square().sum() / max(sums.numel(), 1)


def importance_loss(importance: Tensor) -> Tensor:
    """The squared coefficient of variation of the importance (arXiv 1701.06538, eq. 7); 0 if even.

    Args:
        importance: [E] sums of the tokens' probabilities
    """
    if importance.dim() != 1:
        raise RuntimeError(f"importance_loss: importance must be [E], got {list(importance.shape)}")
    parts = shares(importance)
    # The parts sum to one, or to zero without tokens.
    return (parts * parts.shape[0] - parts.sum()).square().mean()
