"""The public ops: what each computes, what it takes, what it refuses.

Every function checks its arguments, applies the autocast rule, and hands over to the backend that ``registry`` picks.
Shapes: B batch, H heads, Lq/Lk query/key positions, d head dim, M rows of L tokens, D model width, V vocabulary.
All ops take float32, bfloat16 and float16 (float64 too where the torch backend runs), accumulate in float32 or wider,
are deterministic bit for bit, and are differentiable once. They raise ``TypeError`` for a wrong dtype and
``ValueError`` for a wrong shape, device or number; each message names the argument, what was given and what is
expected.

Under autocast, attention and ``linear_nll`` cast their matrix operands to the autocast dtype, ``linear`` its input; the
other ops run in the dtype they are given. Losses come back in float32 (float64 for float64 inputs).
"""

from cnm_kernels.ops.absorbed_attention import absorbed_attention
from cnm_kernels.ops.attention_weights import attention_weights
from cnm_kernels.ops.branched_attention import branched_attention
from cnm_kernels.ops.contrastive_reconstruction_loss import contrastive_reconstruction_loss
from cnm_kernels.ops.dropout import dropout
from cnm_kernels.ops.dropout_add_layer_norm import dropout_add_layer_norm
from cnm_kernels.ops.gaussian_attention import gaussian_attention
from cnm_kernels.ops.gaussian_mask import gaussian_mask
from cnm_kernels.ops.intra_video_contrastive_loss import intra_video_contrastive_loss
from cnm_kernels.ops.linear import linear
from cnm_kernels.ops.linear_nll import linear_nll
from cnm_kernels.ops.negative_gaussian_masks import negative_gaussian_masks
from cnm_kernels.ops.weighted_attention import weighted_attention

__all__ = [
    "absorbed_attention",
    "attention_weights",
    "branched_attention",
    "contrastive_reconstruction_loss",
    "dropout",
    "dropout_add_layer_norm",
    "gaussian_attention",
    "gaussian_mask",
    "intra_video_contrastive_loss",
    "linear",
    "linear_nll",
    "negative_gaussian_masks",
    "weighted_attention",
]
