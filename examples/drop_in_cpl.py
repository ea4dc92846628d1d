"""Training code with the published CPL's interfaces, 8 proposals per sentence, accelerated without editing it.

python -m examples.drop_in_cpl            # accelerated
python -m examples.drop_in_cpl --plain    # the same without the two lines
"""

from __future__ import annotations

import torch
from torch import Tensor

import cnm_kernels
from examples import embedded
from examples.research_code import cpl_losses
from examples.research_code.cpl import CPL

PROPOSALS = 8
LOSS = {"margin_1": 0.1, "margin_2": 0.15, "lambda": 0.146, "alpha_1": 1, "alpha_2": 5, "num_props": PROPOSALS}


def main(epochs: int = 4, videos: int = 800, plain: bool = False) -> tuple[float, float]:
    """Seconds per batch and the test mIoU."""
    torch.manual_seed(0)
    train_split, test_split, sizes = embedded.open_data(videos)
    model = CPL(sizes | {"num_props": PROPOSALS, "sigma": 9, "gamma": 0.5, "max_epoch": epochs})
    if not plain:
        cnm_kernels.accelerate(model)  # <-
        cnm_kernels.accelerate_losses(cpl_losses, model)  # <-
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step(batch: dict[str, Tensor], epoch: int) -> dict[str, float]:
        optimizer.zero_grad()
        output = model(**batch, epoch=epoch + 1)  # as published: negatives grow from the first on
        reconstruction, numbers = cpl_losses.rec_loss(**output, **LOSS)
        contrast, more_numbers = cpl_losses.ivc_loss(**output, **LOSS)
        (reconstruction + contrast).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        return numbers | more_numbers

    def localize(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The proposal that reconstructs its sentence best."""
        output = model(**batch, epoch=epochs)
        ids, mask = (output[name].repeat_interleave(PROPOSALS, 0) for name in ("words_id", "words_mask"))
        nll, _ = cpl_losses.cal_nll_loss(output["words_logit"], ids, mask)
        best = nll.view(-1, PROPOSALS).argmin(-1, keepdim=True)
        center, width = (output[name].view(-1, PROPOSALS).gather(-1, best)[:, 0] for name in ("center", "width"))
        return center, width

    seconds = embedded.train(model, train_split, epochs, step)
    score = embedded.evaluate(model, test_split, localize)
    cnm_kernels.restore(cpl_losses)
    return seconds, score


if __name__ == "__main__":
    main(**vars(embedded.arguments(__doc__)))
