"""What the compiled backends share on the Python side: per op its fake kernel and its autograd formula.

A backend registers the operators ``<namespace>::<op>`` and ``<namespace>::<op>_backward`` with the schemas that
``csrc/schemas.cpp`` states; ``register(namespace)`` of an op's file here adds what only Python can, and returns the
functions that ``registry`` looks for.
"""

from cnm_kernels.autograd import (
    absorbed_attention,
    attention,
    branched_attention,
    dropout,
    dropout_add_layer_norm,
    gaussian_mask,
    intra_video_contrastive_loss,
    linear,
    linear_nll,
)

__all__ = [
    "absorbed_attention",
    "attention",
    "branched_attention",
    "dropout",
    "dropout_add_layer_norm",
    "gaussian_mask",
    "intra_video_contrastive_loss",
    "linear",
    "linear_nll",
]
