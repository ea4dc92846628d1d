"""The ops, by name: the one list that the registry, the backends and the tests loop over.

An op's files carry its name (``ops/<op>.py``, ``autograd/<op>.py``, ``csrc/<op>_op.cpp``, ``csrc/cpu/<op>.cpp``, ...);
here stands which ops share the kernels of another name, which have none, and which are for CPUs alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """One op.

    Args:
        name: of the public function, of ``reference``'s function and of the backends' functions.
        kernels: the name that its kernels and their files carry, where that is not its own.
        cpp: the name of the C++ and CUDA files with its kernels, where even that is another.
        library: on GPUs PyTorch or a vendor's library runs it, so that a backend asked for by name may leave it out.
        composed: it has no kernels: its autograd file calls those of other ops.
    """

    name: str
    kernels: str = ""
    cpp: str = ""
    library: bool = False
    composed: bool = False

    @property
    def file(self) -> str:
        """The name that the files of its kernels carry."""
        return self.kernels or self.name


OPS = (
    Op("gaussian_mask"),
    Op("weighted_attention", kernels="attention"),
    Op("gaussian_attention", kernels="attention"),
    Op("attention_weights", kernels="attention"),
    Op("branched_attention", cpp="attention"),
    Op("absorbed_attention", library=True),
    Op("linear", library=True),
    Op("linear_nll"),
    Op("intra_video_contrastive_loss"),
    Op("contrastive_reconstruction_loss", composed=True),
    Op("dropout"),
    Op("dropout_add_layer_norm"),
)

ATTENTION = frozenset(op.name for op in OPS if "attention" in (op.kernels, op.cpp))  # those with attention's kernels


def kernel_files(*, library: bool = True) -> list[str]:
    """The names that files with kernels carry, each once; without ``library`` those that GPUs run."""
    ops = [op for op in OPS if not op.composed and (library or not op.library)]
    return list(dict.fromkeys(op.file for op in ops))
