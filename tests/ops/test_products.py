"""How ``linear`` multiplies float32 on CPUs: split into bfloat16 numbers, or by PyTorch, as on any processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from samples import Draw
from torch import Tensor

import cnm_kernels
from cnm_kernels import native, products

if "cpu" in native.LOAD_ERRORS:
    pytest.skip(f"no compiled module: {native.LOAD_ERRORS['cpu']}", allow_module_level=True)

from cnm_kernels import _C_cpu

HAS_BF16 = _C_cpu.best_isa() in ("avx512bf16", "amx")
on_bf16 = pytest.mark.skipif(not HAS_BF16, reason="no instruction that multiplies bfloat16")
ROUNDING = 2.0**-24  # of float32
# The error of a b: hi + lo leaves out 2^-16 |a| and 2^-16 |b| at most, and lo lo is no more than 2^-16 |a b|.
OF_A_PRODUCT = 3 * 2.0**-16
# In the mean square each of the three is 2.5e-6 |a b|, as measured over all significands: 4.4e-6 together.
MEAN_SQUARE = (4.0e-6, 4.7e-6)
SMALLEST = 2.0**-126  # normal number: halves and products below it count as 0
# Infinities and NaN; beyond bfloat16, which ends at 3.39e38; near the end, where halves reach past it.
UNUSUAL = (float("inf"), -float("inf"), float("nan"), 3.395e38, 3.402e38, -3.4e38, 3.3e38, 0.0, -0.0)
SMALL = (1e-36, 3e-38, 1e-38, 1e-40, 1e-45)


@dataclass(frozen=True)
class Example:
    """A layer [M, K], N rows to it and the gradient of what comes out."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    upstream: Tensor

    @staticmethod
    def drawn(N: int, K: int, M: int, seed: int = 0) -> Example:
        draw = Draw(f"products {N} {K} {M} {seed}", torch.float32, "cpu")
        return Example(draw.normal(N, K), draw.normal(M, K), draw.normal(M), draw.normal(N, M))

    def results(self, precision: str, backward: str = "highest", **options: Tensor | bool) -> list[Tensor]:
        """The output and the gradients of x, weight and bias, with PyTorch's switch set for forward and backward."""
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (self.x, self.weight, self.bias)]
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(precision)
            with cnm_kernels.use_backend("native"):
                out = cnm_kernels.linear(*leaves, **options)
            torch.set_float32_matmul_precision(backward)
            return [out.detach(), *torch.autograd.grad(out, leaves, self.upstream)]
        finally:
            torch.set_float32_matmul_precision(before)

    def exact(self) -> list[Tensor]:
        x, weight, bias, upstream = (t.double() for t in (self.x, self.weight, self.bias, self.upstream))
        return [x @ weight.T + bias, upstream @ weight, upstream.T @ x, upstream.sum(0)]

    def of_sizes(self) -> list[Tensor]:
        """Sums of |a| |b| where ``exact`` has sums of a b."""
        return Example(self.x.abs(), self.weight.abs(), self.bias.abs(), self.upstream.abs()).exact()

    def allowed(self) -> list[Tensor]:
        """The bound on the error of each number of split products."""
        (N, K), M = self.x.shape, self.weight.size(0)
        largest = max(t.abs().max().item() for t in (self.x, self.weight, self.upstream) if t.numel())
        tiny = 4 * SMALLEST * max(1.0, largest)
        terms = ((OF_A_PRODUCT, K + 1), (OF_A_PRODUCT, M), (OF_A_PRODUCT, N), (0.0, N))
        of_sizes = zip(self.of_sizes(), terms, strict=True)
        return [total * (share + 3 * n * ROUNDING) + n * tiny for total, (share, n) in of_sizes]

    def check(self, precision: str) -> None:
        for found, exact, allowed in zip(self.results(precision), self.exact(), self.allowed(), strict=True):
            assert ((found - exact).abs() <= allowed).all()


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes the rules those of another processor."""
    monkeypatch.setattr(products, "splits", products.splits)
    monkeypatch.setattr(products, "library", products.library)
    return products.use


@pytest.fixture
def split(processor: Callable[[str, str], None]) -> None:
    """Split products wherever they are asked for, on this processor's instructions."""
    processor("GenuineIntel", "amx")


@pytest.fixture
def switch() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit, NaN like NaN."""
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(left, right, strict=True))


# ---- split ----


@on_bf16
@pytest.mark.usefixtures("split")
def test_split_products_are_off_as_their_formula_is() -> None:
    """A smaller error would be float32's; a larger one means that one of the three products is missing."""
    example = Example.drawn(700, 200, 160)
    found, exact, sizes = example.results("high"), example.exact(), example.of_sizes()
    example.check("high")
    for ours, right, size in list(zip(found, exact, sizes, strict=True))[:3]:
        error = (ours - right).square().mean().sqrt() / right.square().mean().sqrt()
        assert MEAN_SQUARE[0] < error < MEAN_SQUARE[1]
        assert ((ours - right).abs() / size).max() < 4e-6
    assert torch.equal(found[3], example.results("highest")[3])  # plain sums


@on_bf16
@pytest.mark.usefixtures("split")
@given(N=st.integers(0, 220), K=st.integers(1, 70), M=st.integers(1, 70), seed=st.integers(0, 9))
def test_any_size(N: int, K: int, M: int, seed: int) -> None:
    Example.drawn(N, K, M, seed).check("high")


@on_bf16
@pytest.mark.usefixtures("split")
def test_groups_lengths_strides_and_relu() -> None:
    """Against the same in float32."""
    draw = Draw("split options", torch.float32, "cpu")
    x, weight, bias = draw.normal(5, 9, 3, 34)[..., ::2], draw.normal(3, 17, 11).mT, draw.normal(3, 11)
    lengths, upstream = draw.lengths(0, 9, 4, 1, 8), draw.normal(5, 9, 3, 11)
    for relu in (False, True):
        example = Example(x, weight, bias, upstream)
        found = example.results("high", lengths=lengths, relu=relu)
        expected = example.results("highest", lengths=lengths, relu=relu)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.equal(found[0], expected[0])
        assert not found[0][0].any()


@on_bf16
@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("where", ["x", "weight", "upstream"])
@pytest.mark.parametrize("value", UNUSUAL)
def test_unusual_numbers_are_what_they_are_in_float32(where: str, value: float) -> None:
    """A half that is not finite would make NaN of what is infinite, or of a number."""
    example = Example.drawn(130, 40, 33)
    changed = getattr(example, where).clone()
    changed[5, 7] = value
    example = replace(example, **{where: changed})
    found, expected = example.results("high"), example.results("highest")
    for ours, theirs in zip(found, expected, strict=True):
        unusual = ~theirs.isfinite() | (theirs.abs() > 1e30)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        torch.testing.assert_close(ours[unusual].nan_to_num(), theirs[unusual].nan_to_num(), rtol=2e-5, atol=0)
        torch.testing.assert_close(ours[~unusual], theirs[~unusual], rtol=1e-4, atol=1e-4)


@on_bf16
@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("scale", SMALL)
def test_small_numbers_lose_no_more_than_denormals_do(scale: float) -> None:
    example = Example.drawn(60, 20, 33)
    replace(example, x=example.x * scale).check("high")
    replace(example, weight=example.weight * scale, bias=example.bias * scale).check("high")
    replace(example, upstream=example.upstream * scale).check("high")


@on_bf16
@pytest.mark.usefixtures("split")
def test_a_bias_may_be_infinite() -> None:
    example = Example.drawn(60, 20, 33)
    example.bias[3] = -float("inf")
    found = example.results("high")
    assert (found[0][:, 3] == -float("inf")).all()
    assert not torch.equal(found[0][:, :3], example.results("highest")[0][:, :3])  # split even so


@on_bf16
@pytest.mark.usefixtures("split")
def test_the_forwards_precision_is_its_backwards() -> None:
    example = Example.drawn(200, 64, 50)
    high, float32 = example.results("high"), example.results("highest")
    assert not same(high[1:2], float32[1:2])
    assert not same(high[2:3], float32[2:3])
    assert same(example.results("high", backward="high"), high)
    assert same(example.results("highest", backward="high"), float32)
    assert same(example.results("medium"), high)


@on_bf16
@pytest.mark.usefixtures("split")
def test_threads_do_not_change_a_bit() -> None:
    example = Example.drawn(5001, 120, 77)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 2, 2):
            torch.set_num_threads(threads)
            found.append(example.results("high"))
    finally:
        torch.set_num_threads(before)
    assert all(same(found[0], other) for other in found)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_without_bfloat16_products_float32_is_float32(isa: str) -> None:
    before = _C_cpu.isa()
    try:
        _C_cpu.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        example = Example.drawn(70, 30, 20)
        assert same(example.results("high"), example.results("highest"))
    finally:
        _C_cpu.set_isa(before)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_operands_are_multiplied_as_ever(dtype: torch.dtype) -> None:
    example = Example.drawn(70, 30, 20)
    example = replace(example, x=example.x.to(dtype), upstream=example.upstream.to(dtype))
    assert same(example.results("high"), example.results("highest"))


@on_bf16
@pytest.mark.usefixtures("split")
def test_a_compiled_call_follows_the_switch(switch: Callable[[str], None]) -> None:
    example = Example.drawn(40, 64, 20)
    compiled = torch.compile(lambda x: cnm_kernels.linear(x, example.weight), backend="aot_eager", fullgraph=True)
    found = {}
    for precision in ("highest", "high", "highest", "high"):
        switch(precision)
        found[precision] = compiled(example.x)
        with cnm_kernels.use_backend("native"):
            assert torch.equal(found[precision], cnm_kernels.linear(example.x, example.weight))
    assert not torch.equal(found["highest"], found["high"])


@pytest.mark.usefixtures("split", "switches")
def test_the_switch_for_cpus_counts_alone() -> None:
    """PyTorch's older question raises where one backend's switch is turned and the others' are not."""
    x = torch.randn(2, 3)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert not products.split(x)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert products.split(x)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert not products.split(x)


@pytest.mark.parametrize("split", [False, True])
def test_the_operator_keeps_pytorchs_rules(split: bool) -> None:
    example = Example.drawn(6, 8, 5)
    x = example.x.requires_grad_()
    torch.library.opcheck(torch.ops.cnm_kernels.linear, (x, example.weight, example.bias, True, None, split))


# ---- by processor ----


def test_only_tiles_split(processor: Callable[[str, str], None], switch: Callable[[str], None]) -> None:
    x = torch.zeros(2, 8)
    for isa, splits in {"portable": False, "avx2": False, "avx512": False, "avx512bf16": False, "amx": True}.items():
        processor("GenuineIntel", isa)
        switch("highest")
        assert not products.split(x)
        switch("high")
        assert products.split(x) == splits
        assert not products.split(x.bfloat16())


def test_which_layers_are_left_to_pytorch(processor: Callable[[str, str], None], switch: Callable[[str], None]) -> None:
    switch("highest")
    x, weight = torch.zeros(2, 512), torch.zeros(3, 512)
    for vendor, isa, left in (
        ("GenuineIntel", "avx512", True),
        ("GenuineIntel", "avx512bf16", True),
        ("GenuineIntel", "amx", True),
        ("GenuineIntel", "avx2", False),
        ("AuthenticAMD", "avx512bf16", False),
        ("", "portable", False),
    ):
        processor(vendor, isa)
        assert products.by_library(x, weight, None) == left
    processor("GenuineIntel", "amx")
    assert not products.by_library(x[:, 1:], weight[:, 1:], None)
    assert not products.by_library(x.bfloat16(), weight, None)
    assert not products.by_library(torch.zeros(2, 4, 512), torch.zeros(4, 3, 512), None)
    assert not products.by_library(torch.zeros(2, 4, 512), weight, torch.tensor([4, 4]))
    switch("high")  # tiles are faster still
    assert not products.by_library(x, weight, None)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("intel", [False, True])
def test_both_ways_are_right(intel: bool, relu: bool, processor: Callable[[str, str], None]) -> None:
    processor("GenuineIntel" if intel else "AuthenticAMD", "avx512")
    example = Example.drawn(90, 512, 70)
    found = example.results("highest", relu=relu)
    leaves = [tensor.clone().requires_grad_() for tensor in (example.x, example.weight, example.bias)]
    out = F.linear(*leaves)
    out = out.relu() if relu else out
    expected = [out.detach(), *torch.autograd.grad(out, leaves, example.upstream)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert same(found, example.results("highest", relu=relu))
    if intel:
        assert same(found, expected)


def test_a_compiled_layer_that_is_left_to_pytorch(processor: Callable[[str, str], None]) -> None:
    processor("GenuineIntel", "avx512")
    example = Example.drawn(20, 512, 7)
    compiled = torch.compile(lambda x: cnm_kernels.linear(x, example.weight), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(example.x), F.linear(example.x, example.weight))
