"""Losses with the interfaces of the published CNM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cal_nll_loss(logit: Tensor, idx: Tensor, mask: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Label-smoothed nll per sentence, and the accuracy. logit [B, L, V]; the rest [B, L]."""
    accuracy = ((logit.argmax(-1) == idx).float() * mask).sum() / mask.sum()
    log_p = logit.log_softmax(-1)
    token = -0.9 * log_p.gather(-1, idx[:, :, None])[:, :, 0] - 0.1 * log_p.mean(-1)
    if weights is not None:
        return (token * weights).sum(-1), accuracy
    return (token * mask).sum(-1) / mask.sum(-1), accuracy


def rec_loss(
    words_logit: Tensor,
    words_id: Tensor,
    words_mask: Tensor,
    hard_neg_words_logit: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, float]]:
    nll = loss = cal_nll_loss(words_logit, words_id, words_mask)[0].mean()
    numbers = {"nll_loss": nll.item()}
    if hard_neg_words_logit is not None:
        hard = cal_nll_loss(hard_neg_words_logit, words_id, words_mask)[0].mean()
        loss, numbers["neg_nll_loss"] = nll + hard, hard.item()
    return loss, {"final_loss": loss.item(), **numbers}


def ivc_loss(
    words_logit: Tensor,
    words_id: Tensor,
    words_mask: Tensor,
    hard_neg_words_logit: Tensor | None = None,
    easy_neg_words_logit: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, float]]:
    nll = cal_nll_loss(words_logit, words_id, words_mask)[0]
    zero = torch.zeros_like(nll)
    loss, hard, easy = nll.mean(), zero.mean(), zero.mean()
    if hard_neg_words_logit is not None:
        negative = cal_nll_loss(hard_neg_words_logit, words_id, words_mask)[0]
        loss = hard = torch.max(nll - negative + kwargs["beta_1"], zero).mean()
    if easy_neg_words_logit is not None:
        negative = cal_nll_loss(easy_neg_words_logit, words_id, words_mask)[0]
        easy = torch.max(nll - negative + kwargs["beta_2"], zero).mean()
        loss = loss + easy
    return loss, {"ivc_loss": loss.item(), "easy_neg_loss": easy.item(), "hard_neg_loss": hard.item()}
