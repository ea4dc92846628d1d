"""Training code with the published CNM's interfaces, accelerated without editing it, on embedded data.

    python -m examples.drop_in_cnm            # accelerated
    python -m examples.drop_in_cnm --plain    # the same without the two lines

Everything below but the two marked lines is what such a training script does anyway: two optimizers that take turns on
every batch, gradients clipped, numbers printed.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cnm_kernels
from examples import embedded
from examples.research_code import cnm_losses
from examples.research_code.cnm import CNM

LOSS = {"beta_1": 0.1, "beta_2": 0.15}


def main(epochs: int = 4, videos: int = 800, plain: bool = False) -> tuple[float, float]:
    """Seconds per batch and the test mIoU."""
    torch.manual_seed(0)
    train_split, test_split, sizes = embedded.open_data(videos)
    model = CNM(sizes | {"alpha": 5.5, "max_width": 0.45})
    if not plain:
        cnm_kernels.accelerate(model)  # <-
        cnm_kernels.accelerate_losses(cnm_losses, model)  # <-

    model.train_only(generator=False)
    reconstructor = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    model.train_only(generator=True)
    generator = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)

    def update(batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, loss_name: str) -> dict[str, float]:
        model.train_only(generator=optimizer is generator)
        optimizer.zero_grad()
        output = model(**batch)
        loss, numbers = getattr(cnm_losses, loss_name)(**output, **LOSS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        return numbers

    def step(batch: dict[str, Tensor], epoch: int) -> dict[str, float]:
        return update(batch, reconstructor, "rec_loss") | update(batch, generator, "ivc_loss")

    def localize(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = model(**batch)
        return output["center"], output["width"]

    seconds = embedded.train(model, train_split, epochs, step)
    score = embedded.evaluate(model, test_split, localize)
    cnm_kernels.restore(cnm_losses)
    return seconds, score


if __name__ == "__main__":
    main(**vars(embedded.arguments(__doc__)))
