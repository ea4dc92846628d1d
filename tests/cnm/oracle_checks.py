"""Shared by the comparisons with published CNM and CPL: configurations, and parameters worth comparing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def dataset_section(case: Any) -> dict[str, Any]:
    """The ``dataset`` of a configuration of this case's sizes."""
    return {
        "dataset": "synthetic",
        "vocab_size": case.vocab_size - 1,
        "word_dim": case.word_dim,
        "frame_dim": case.frame_dim,
        "max_num_words": case.num_words,
        "max_num_frames": case.num_frames,
    }


def transformer_section(case: Any, dropout: float) -> dict[str, Any]:
    """The ``DualTransformer`` of a configuration of this case's sizes."""
    return {
        "d_model": case.d_model,
        "num_heads": case.num_heads,
        "num_decoder_layers1": 3,
        "num_decoder_layers2": 3,
        "dropout": dropout,
    }


@torch.no_grad()
def randomize(oracle: nn.Module) -> None:
    """Every parameter away from its initial value: zeros would hide a wrong bias, ones a wrong norm."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in oracle.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        spread = 0.2 if parameter.dim() == 1 else parameter.size(1) ** -0.5
        value = spread * noise + (1.0 if name.endswith("norm.weight") else 0.0)
        if "fc1" in name:  # of two million units rounding would move one across the kink of ReLU
            value = value / 3 + (noise.sign() if parameter.dim() == 1 else 0.0)
        parameter.copy_(value.float())  # exact in float32: that comparison sees rounding inside the model only
