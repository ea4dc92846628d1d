"""Losses with the interfaces of the published CPL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.research_code.cnm_losses import cal_nll_loss as cal_nll_loss


def rec_loss(
    words_logit: Tensor,
    words_id: Tensor,
    words_mask: Tensor,
    num_props: int,
    ref_words_logit: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, float]]:
    nll = _per_proposal(words_logit, words_id, words_mask, num_props)
    best = loss = nll.min(-1)[0].mean()
    numbers = {"nll_loss": best.item()}
    if ref_words_logit is not None:
        reference = cal_nll_loss(ref_words_logit, words_id, words_mask)[0].mean()
        loss, numbers["ref_nll_loss"] = (best + reference) / 2, reference.item()
    return loss, {"final_loss": loss.item(), **numbers}


def ivc_loss(
    words_logit: Tensor,
    words_id: Tensor,
    words_mask: Tensor,
    num_props: int,
    neg_words_logit_1: Tensor | None = None,
    neg_words_logit_2: Tensor | None = None,
    ref_words_logit: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, float]]:
    best, index = _per_proposal(words_logit, words_id, words_mask, num_props).min(-1)
    zero = torch.zeros_like(best)
    numbers = {"ref_loss": 0.0, "neg_loss_1": 0.0, "neg_loss_2": 0.0}
    rank = best.mean()
    if ref_words_logit is not None:
        reference = cal_nll_loss(ref_words_logit, words_id, words_mask)[0]
        rank = torch.max(best - reference + kwargs["margin_1"], zero).mean()
        numbers["ref_loss"] = rank.item()
    for name, logits in (("neg_loss_1", neg_words_logit_1), ("neg_loss_2", neg_words_logit_2)):
        if logits is not None:
            negative = _per_proposal(logits, words_id, words_mask, num_props).gather(-1, index[:, None])[:, 0]
            margin = torch.max(best - negative + kwargs["margin_2"], zero).mean()
            rank, numbers[name] = rank + margin, margin.item()
    weight = kwargs["gauss_weight"].view(len(best), num_props, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    target = kwargs["lambda"] * torch.eye(num_props, dtype=weight.dtype, device=weight.device)
    diversity = ((target - weight @ weight.mT) ** 2).sum((1, 2)).mean()
    loss = kwargs["alpha_1"] * rank + kwargs["alpha_2"] * diversity
    return loss, {"ivc_loss": loss.item(), "div_loss": diversity.item(), **numbers}


def _per_proposal(logits: Tensor, words_id: Tensor, words_mask: Tensor, num_props: int) -> Tensor:
    """[B K, L, V] -> [B, K]"""
    ids, mask = (x.repeat_interleave(num_props, 0) for x in (words_id, words_mask))
    return cal_nll_loss(logits, ids, mask)[0].view(-1, num_props)
