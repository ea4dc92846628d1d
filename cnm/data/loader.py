"""Makes batches in an order that depends on (seed, epoch) alone; a thread prepares them in advance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cnm.data.batch import Batch
from cnm.data.buffers import BufferPool
from cnm.data.split import Split

AHEAD = 2  # batches prepared in advance


class BatchLoader:
    """Cuts a split into batches; the last one may be smaller.

    Args:
        split: what to cut.
        batch_size: sentences per batch.
        shuffle: a new order every epoch; otherwise the split's order.
        seed: determines the orders.
        part: maps the number of a batch's samples to the rows to load (``Group.rows``); None loads all. The yielded
            indices are always those of the whole batch.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        part: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.part = part
        self._buffers = BufferPool(AHEAD + 2)  # as many as exist at once: those ahead, the next and the current one

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Returns the sample indices of an epoch, in order."""
        if not self.shuffle:
            return np.arange(len(self.split))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.split))

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yields (indices, batch), from batch ``start`` on, while a thread prepares the next ones."""
        order = self.order(epoch)
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)][start:]
        ready: deque[tuple[np.ndarray, Future[Batch]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
            try:
                for chunk in chunks:
                    own = chunk if self.part is None else chunk[self.part(len(chunk))]
                    # Pad as the whole batch is: no last row is reconstructed, and all parts must agree on which it is.
                    ready.append(
                        (chunk, worker.submit(self.split.batch, own, self.split.longest(chunk), self._buffers))
                    )
                    if len(ready) > AHEAD:
                        indices, future = ready.popleft()
                        yield indices, future.result()
                while ready:
                    indices, future = ready.popleft()
                    yield indices, future.result()
            finally:
                worker.shutdown(wait=True, cancel_futures=True)
