"""CPL's Gaussians: normalised by sigma, left and right negatives, K proposals per sentence, mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import targets
from torch import Tensor

import cnm_kernels

SIGMA = 9.0
on_every_float32 = pytest.mark.parametrize(("backend", "device", "dtype"), targets("gaussian_mask", [torch.float32]))


def published(length: int, center: Tensor, width: Tensor, sigma: float, min_width: float = 0.01) -> Tensor:
    """A density of standard deviation width / sigma over its maximum, as CPL writes it."""
    x = torch.linspace(0, 1, length, dtype=center.dtype)
    deviation = width.unsqueeze(-1).clamp(min_width) / sigma
    density = 0.3989422804014327 / deviation * torch.exp(-((x - center.unsqueeze(-1)) ** 2) / (2 * deviation**2))
    return density / density.max(dim=-1, keepdim=True)[0]


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return torch.autograd.grad(output, inputs, upstream)


def proposals(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    width = (0.4 + 0.5 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)
    return center.requires_grad_(), width.requires_grad_()


@pytest.mark.parametrize("length", [1, 2, 50, 37])
@pytest.mark.parametrize("shape", [(5,), (3, 8)])
def test_sigma_gives_the_published_form(length: int, shape: tuple[int, ...]) -> None:
    center, width = proposals(*shape)
    ours = cnm_kernels.gaussian_mask(center, width, length, sigma=SIGMA)
    theirs = published(length, center, width, SIGMA)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for mine, other in zip(gradients(ours, center, width), gradients(theirs, center, width), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("growth", [0.0, 0.3, 1.0])
def test_negatives_are_the_published_ones(growth: float) -> None:
    center, width = proposals(4, 8)
    left_size = (center - width / 2).clamp(min=0)
    right_center = 1 - (1 - center - width / 2).clamp(min=0) * growth * 0.5
    left_center = left_size * growth * 0.5
    theirs = (
        published(50, left_center, left_center, SIGMA / 2),
        published(50, right_center, 1 - right_center, SIGMA / 2),
    )
    ours = cnm_kernels.negative_gaussian_masks(center, width, 50, sigma=SIGMA, growth=growth)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)
        for d_mine, d_other in zip(gradients(mine, center, width), gradients(other, center, width), strict=True):
            torch.testing.assert_close(d_mine, d_other, rtol=1e-8, atol=1e-8)


@on_every_float32
def test_a_mask_between_two_far_points_is_finite(backend: str, device: str, dtype: torch.dtype) -> None:
    center = torch.tensor([0.25], device=device, requires_grad=True)
    width = torch.tensor([0.0], device=device, requires_grad=True)
    with cnm_kernels.use_backend(backend):
        mask = cnm_kernels.gaussian_mask(center, width, 3, sigma=SIGMA)
        assert mask.tolist() == [[1.0, 1.0, 0.0]]
        assert all(gradient.isfinite().all() for gradient in gradients(mask, center, width))
    assert published(3, center, width, SIGMA).isnan().all()  # the density underflows to 0 / 0


@pytest.mark.parametrize("min_width", [1e-30, 1e-20, 0.01])
@on_every_float32
def test_widths_whose_squares_overflow_or_underflow(
    backend: str, device: str, dtype: torch.dtype, min_width: float
) -> None:
    """The largest sample is 1 and any other 0, or all are 1; the gradients are finite."""
    center = torch.tensor([0.27, 0.52, 1.0, 2.0, -1.0, 0.1, 0.0], device=device, requires_grad=True)
    width = torch.tensor([0.0, 1e-20, -1.0, 1e-19, 3e-30, 3e30, 1e20], device=device, requires_grad=True)
    wide = center.detach().double(), width.detach().double()
    exact = cnm_kernels.gaussian_mask(*wide, 6, sigma=SIGMA, min_width=min_width)
    with cnm_kernels.use_backend(backend):
        mask = cnm_kernels.gaussian_mask(center, width, 6, sigma=SIGMA, min_width=min_width)
        if min_width < 0.01:
            nearest = torch.tensor([1, 3, 5, 5, 0], device=device)
            assert torch.equal(mask[:5], F.one_hot(nearest, 6).to(mask))
        torch.testing.assert_close(mask.double(), exact, rtol=1e-4, atol=1e-6)
        assert all(gradient.isfinite().all() for gradient in gradients(mask, center, width))


@on_every_float32
def test_what_is_not_a_number_stays_so(backend: str, device: str, dtype: torch.dtype) -> None:
    nan = float("nan")
    center, width = torch.tensor([nan, 0.5], device=device), torch.tensor([0.5, nan], device=device)
    with cnm_kernels.use_backend(backend):
        assert cnm_kernels.gaussian_mask(center, width, 5, sigma=SIGMA).isnan().all()


@on_every_float32
def test_no_sample_is_above_1_where_two_tie_but_for_rounding(backend: str, device: str, dtype: torch.dtype) -> None:
    length = 50
    between = (torch.arange(length - 1) + 0.5) / (length - 1)
    center = torch.cat([between, between.nextafter(torch.ones(())), between.nextafter(torch.zeros(()))]).to(device)
    with cnm_kernels.use_backend(backend):
        mask = cnm_kernels.gaussian_mask(center, torch.full_like(center, 1e-3), length, sigma=SIGMA, min_width=1e-3)
    assert mask.max() == 1
    assert (mask.max(-1).values == 1).all()


@on_every_float32
def test_of_two_samples_that_tie_the_first_stays_1(backend: str, device: str, dtype: torch.dtype) -> None:
    center = torch.tensor(0.25, device=device, requires_grad=True)
    width = torch.tensor(1.0, device=device, requires_grad=True)
    with cnm_kernels.use_backend(backend):
        first, second, _ = cnm_kernels.gaussian_mask(center, width, 3, sigma=SIGMA)
        assert torch.autograd.grad(first, (center, width), retain_graph=True) == (0, 0)
        d_center, d_width = torch.autograd.grad(second, (center, width))
    assert (d_center.item(), d_width.item()) == (pytest.approx(SIGMA**2 / 2), 0)  # 2 alpha (x - x of the first) / w^2


@pytest.mark.parametrize("width", [0.5, 0.0])
@on_every_float32
def test_a_center_far_outside_leaves_the_nearest_sample(
    backend: str, device: str, dtype: torch.dtype, width: float
) -> None:
    center, widths = torch.tensor([1e9, -1e9, 1e30], device=device), torch.full((3,), width, device=device)
    with cnm_kernels.use_backend(backend):
        mask = cnm_kernels.gaussian_mask(center, widths, 7, sigma=SIGMA, min_width=1e-30)
    assert torch.equal(mask, F.one_hot(torch.tensor([6, 0, 6], device=device), 7).to(mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    center, width = proposals(3, 8, dtype=dtype)
    mask = cnm_kernels.gaussian_mask(center, width, 50, sigma=SIGMA)
    exact = published(50, center.double(), width.double(), SIGMA)
    assert mask.dtype == dtype
    torch.testing.assert_close(mask.double(), exact, rtol=0, atol=torch.finfo(dtype).eps + 1e-5)
    complement = cnm_kernels.gaussian_mask(center, width, 50, sigma=SIGMA, complement=True)
    torch.testing.assert_close(complement.double(), 1 - exact, rtol=0, atol=torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either alpha or sigma, got alpha=None and sigma=None"),
        ({"alpha": 5.0, "sigma": 9.0}, "give either alpha or sigma"),
        ({"sigma": 0.0}, r"sigma must be a number above 0, at most 1e\+15, got 0.0"),
        ({"sigma": 9.0, "min_width": 0.0}, "min_width must be above 0, got 0.0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cnm_kernels.gaussian_mask(torch.rand(2), torch.rand(2), 5, **options)


def test_growth_beyond_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"growth must be between 0 and 1, got 1.5"):
        cnm_kernels.negative_gaussian_masks(torch.rand(2), torch.rand(2), 5, sigma=9.0, growth=1.5)


@pytest.mark.parametrize(("backend", "device", "dtype"), targets("weighted_attention", (torch.float32,)))
def test_k_proposals_per_sentence(backend: str, device: str, dtype: torch.dtype) -> None:
    """Centers [N, K], or weights [N, K, Lk], for N K rows of queries: as if they came flat."""
    N, K, H, L, S, d = 2, 3, 2, 5, 7, 8
    query, key, value = (torch.randn(N * K, H, length, d) for length in (L, S, S))
    center, width = proposals(N, K, dtype=torch.float32)
    with cnm_kernels.use_backend(backend):
        together = cnm_kernels.gaussian_attention(query, key, value, center, width, alpha=5.5)
        flat = cnm_kernels.gaussian_attention(query, key, value, center.flatten(), width.flatten(), alpha=5.5)
        assert torch.equal(together, flat)
        for mine, other in zip(gradients(together, center, width), gradients(flat, center, width), strict=True):
            assert mine.shape == (N, K)
            assert torch.equal(mine, other)
        mask = cnm_kernels.gaussian_mask(center, width, S, sigma=SIGMA)
        weighted = cnm_kernels.weighted_attention(query, key, value, mask)
        assert torch.equal(weighted, cnm_kernels.weighted_attention(query, key, value, mask.flatten(0, 1)))


def test_proposals_that_do_not_fit_are_refused() -> None:
    query = torch.randn(6, 2, 5, 8)
    with pytest.raises(ValueError, match=r"center must have shape \[B\] with B = 6, got \[8\]"):
        cnm_kernels.gaussian_attention(query, query, query, torch.rand(2, 4), torch.rand(2, 4), alpha=5.5)
