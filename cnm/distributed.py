"""Several processes train one model: ``torchrun --nproc-per-node N -m cnm train ...``, on one machine or many.

Every process holds the whole model and all random numbers, and computes its share of each batch: sample i of a batch
goes to process i mod N. Gradients are summed, each weighted by its process's share of the batch, so that N processes
with one global batch do what one process does. Only process 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cnm.errors import InputError

TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others: evaluation and checkpoints fit in it


class Group:
    """The processes of this job."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @staticmethod
    @contextmanager
    def joined(device: torch.device) -> Iterator[Group | None]:
        """The job that torchrun started this process for, to the end of the block; None where it stands alone.

        Raises:
            InputError: torchrun's variables are there but the processes cannot be joined.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield None
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where objects are gathered
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"WORLD_SIZE, RANK, MASTER_ADDR: the job's processes cannot be joined ({_one_line(error)}); start "
                f"them with torchrun"
            ) from None
        try:
            yield Group(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()  # its threads would outlive the interpreter, which aborts the process

    def rows(self, count: int) -> np.ndarray:
        """Returns this process's samples of a batch: at least one, see ``share``."""
        mine = np.arange(self.rank, count, self.size)
        return mine if len(mine) else np.zeros(1, dtype=int)

    def share(self, count: int) -> float:
        """Their part of the batch; 0 where the process computes the first sample only not to stand idle."""
        return len(range(self.rank, count, self.size)) / count

    def sum(self, tensors: Sequence[Tensor], share: float) -> list[Tensor]:
        """Every process's tensors times its share, summed: the same bits on all."""
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors]).mul_(share)
        self._call(dist.all_reduce, flat)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is set in any process."""
        votes = torch.tensor([float(flag)], device=device)
        self._call(dist.all_reduce, votes)
        return bool(votes.item() > 0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on all of them."""
        values: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, values, value)
        return values

    def check_same(self, found: dict[str, Any], where: str) -> None:
        """Processes on other machines read their own disks: they must have found the same.

        Raises:
            InputError: they did not; ``where`` is what the message names.
        """
        for rank, other in enumerate(self.gather(found)):
            for name, value in found.items():
                if other[name] != value:
                    raise InputError(
                        f"{where}: process {rank} of the job has {name} {other[name]}, process {self.rank} {value}; "
                        f"give all machines the same files and the same run folder"
                    )

    @torch.no_grad()
    def share_parameters(self, model: torch.nn.Module) -> None:
        """Process 0's, in case the processors round differently."""
        for parameter in model.parameters():
            self._call(dist.broadcast, parameter, 0)

    def _call(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except RuntimeError as error:
            raise InputError(
                f"process {self.rank} of {self.size}: lost another process of the job ({_one_line(error)}); see what "
                f"it said, then continue with `cnm train --resume`"
            ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
