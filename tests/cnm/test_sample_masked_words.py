"""The choice of masked words: how many, never the start token or padding, and with the published probabilities."""

from __future__ import annotations

import itertools

import pytest
import torch

from cnm.masking import sample_masked_words


def test_a_third_of_the_words_at_least_one_never_start_or_padding() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 2, 3, 5, 6, 9, 20])
    weights = (torch.arange(20) < lengths[:, None]).float()
    for _ in range(50):
        masked = sample_masked_words(weights, lengths)
        assert masked.shape == (8, 21)
        assert masked.sum(1).tolist() == [0, 1, 1, 1, 1, 2, 3, 6]
        assert not masked[:, 0].any()
        assert not (masked[:, 1:] & (weights == 0)).any()


@pytest.mark.parametrize("length", [5, 6])
def test_the_law_is_that_of_drawing_one_after_the_other(length: int) -> None:
    """Every set's frequency against its probability under successive draws without replacement (5 sigma)."""
    weights = torch.tensor([0.3, 0.1, 0.05, 0.25, 0.1, 0.2])[:length]
    weights = weights / weights.sum()
    draws, count = 60_000, length // 3
    torch.manual_seed(1)
    masked = sample_masked_words(weights.expand(draws, -1), torch.full((draws,), length))[:, 1:]
    codes = (masked * 2 ** torch.arange(length)).sum(1)
    for chosen in itertools.combinations(range(length), count):
        probability = 0.0
        for order in itertools.permutations(chosen):
            left, product = 1.0, 1.0
            for word in order:
                product *= weights[word].item() / left
                left -= weights[word].item()
            probability += product
        frequency = (codes == sum(2**word for word in chosen)).double().mean().item()
        assert abs(frequency - probability) < 5 * (probability * (1 - probability) / draws) ** 0.5
