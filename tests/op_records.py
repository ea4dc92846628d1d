"""What tests know of each op by name: its record. The samples that records name are in ``samples.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One op.

    Args:
        differentiable: inputs that get gradients, in the order of the arguments.
        integers: int64 inputs.
        own_dtype: inputs that may be float32 beside lower or higher ones.
        autocast: inputs that autocast casts; everything else runs in the dtype it is given.
        typical: small samples with every input differentiable and something of each mode.
        large: samples large enough for threads to share the work.
        smooth: small samples away from kinks and ties, so that finite differences mean something.
        valid: a sample in which every argument is present, for what is refused.
        in_use: the sample that threads, processes and copies run.
    """

    differentiable: tuple[str, ...]
    typical: tuple[str, ...]
    large: tuple[str, ...]
    smooth: tuple[str, ...]
    valid: str
    in_use: str
    integers: tuple[str, ...] = ()
    own_dtype: tuple[str, ...] = ()
    autocast: tuple[str, ...] = ()


RECORDS = {
    "gaussian_mask": Record(
        differentiable=("center", "width"),
        typical=("odd-3x5x37-complement",),
        large=("published-50",),
        smooth=("odd-3x5x37-complement", "length-1", "scalar"),
        valid="odd-3x5x37-complement",
        in_use="published-50",
    ),
    "weighted_attention": Record(
        differentiable=("query", "key", "value", "key_weight"),
        autocast=("query", "key", "value"),
        typical=("weighted-causal-lengths",),
        large=("weighted-frames-200", "weighted-words-20-clips-50"),
        smooth=("weighted-three-heads", "weighted-lengths-0-1-odd-over", "unweighted-causal-more-keys"),
        valid="weighted-causal-lengths",
        integers=("key_lengths",),
        own_dtype=("key_weight",),
        in_use="weighted-causal",
    ),
    "gaussian_attention": Record(
        differentiable=("query", "key", "value", "center", "width"),
        autocast=("query", "key", "value"),
        typical=("causal-lengths", "complement"),
        large=("frames-200", "complement-words-clips"),
        smooth=("causal-more-queries", "complement", "lengths-0-1-odd-over"),
        valid="causal-lengths",
        integers=("key_lengths",),
        own_dtype=("center", "width"),
        in_use="clips-50",
    ),
    "attention_weights": Record(
        differentiable=("query", "key", "key_weight"),
        autocast=("query", "key"),
        typical=("weighted-causal-lengths",),
        large=("weighted-frames-200",),
        smooth=("weighted-three-heads", "weighted-lengths-0-1-odd-over", "unweighted-causal-more-keys"),
        valid="weighted-causal-lengths",
        integers=("key_lengths",),
        own_dtype=("key_weight",),
        in_use="weighted-causal",
    ),
    "branched_attention": Record(
        differentiable=("query", "key", "value", "key_weights"),
        autocast=("query", "key", "value"),
        typical=("plain", "lengths-0-1-odd-over"),
        large=("clips-50",),
        smooth=("plain",),
        valid="lengths-0-1-odd-over",
        integers=("key_lengths",),
        own_dtype=("key_weights",),
        in_use="plain",
    ),
    "absorbed_attention": Record(
        differentiable=("query", "key", "value", "key_bias", "key_weight"),
        autocast=("query", "key", "value"),
        typical=("weighted", "lengths-0-1-odd-over", "keys-are-values"),
        large=("frames-200-words-14", "words-13-clips-50"),
        smooth=("weighted", "lengths-0-1-odd-over"),
        valid="lengths-0-1-odd-over",
        integers=("query_lengths", "key_lengths"),
        own_dtype=("key_bias", "key_weight"),
        in_use="lengths-0-1-odd-over",
    ),
    "linear": Record(
        differentiable=("x", "weight", "bias"),
        autocast=("x",),
        typical=("odd-3x5x37", "lengths-0-1-odd-over", "odd-groups"),
        large=("rows-2500", "feed-forward", "words-13-of-256", "heads-of-columns"),
        smooth=("without-bias", "one-row", "odd-groups-without-bias"),
        valid="lengths-0-1-odd-over",
        integers=("lengths",),
        own_dtype=("weight", "bias"),
        in_use="lengths-0-1-odd-over",
    ),
    "linear_nll": Record(
        differentiable=("hidden", "weight", "bias"),
        autocast=("hidden", "weight", "bias"),
        typical=("odd", "lengths-0-1-odd-over"),
        large=("published-13x256x1112",),
        smooth=("plain", "lengths-0-1-odd-over", "ignored-targets"),
        valid="odd",
        integers=("target", "valid_lengths"),
        own_dtype=("weight", "bias"),
        in_use="lengths-0-1-odd-over",
    ),
    "intra_video_contrastive_loss": Record(
        differentiable=("positive", "hard", "easy"),
        typical=("odd-7",),
        large=("published-128",),
        smooth=("odd-7", "one"),
        valid="odd-7",
        in_use="odd-7",
    ),
    "contrastive_reconstruction_loss": Record(
        differentiable=("hidden", "weight", "bias"),
        autocast=("hidden", "weight", "bias"),
        typical=("plain",),
        large=("published-13x256x1112",),
        smooth=("plain", "ignored-targets"),
        valid="plain",
        integers=("target", "valid_lengths"),
        own_dtype=("weight", "bias"),
        in_use="lengths-0-1-odd-over",
    ),
    "dropout": Record(
        differentiable=("x",),
        typical=("plain",),
        large=("odd-1021",),
        smooth=("plain",),
        valid="plain",
        in_use="rows-of-37",
    ),
    "dropout_add_layer_norm": Record(
        differentiable=("x", "residual", "weight", "bias"),
        typical=("odd-5x37", "chosen-samples"),
        large=("thousand-columns",),
        smooth=("odd-5x37", "no-dropout"),
        valid="odd-5x37",
        own_dtype=("weight", "bias"),
        in_use="published-12x256",
    ),
}
