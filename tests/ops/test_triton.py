"""The Triton backend alone; the tests of every backend are in ``test_every_op.py``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_checks import check_deterministic, check_gradients, check_values
from op_records.draw import Draw
from op_records.linear_nll import vocabulary
from op_records.weighted_attention import ATTENTION_SHAPES
from samples import sample, with_slow
from step_checks import assert_trains_as_torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cnm_kernels
from cnm.training.step import STEPS
from cnm_kernels import op_list, registry

pytestmark = pytest.mark.skipif(
    registry.unavailable("dropout", "triton", "cpu", torch.float32) is not None and not torch.cuda.is_available(),
    reason="needs triton",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION = [
    *(("weighted_attention", f"{kind}-{name}") for kind in ("unweighted", "weighted") for name in ATTENTION_SHAPES),
    *(("gaussian_attention", name) for name in [*ATTENTION_SHAPES, "complement", "narrow-and-outside-complement"]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), ATTENTION)
def test_the_blocked_kernels_take_every_size(
    op: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default they run for long sequences alone."""
    from cnm_kernels.triton import attention

    nothing = {2: (0, 0), 4: (0, 0)}
    monkeypatch.setattr(attention, "WHOLE", {"attention": nothing, "attention_backward": nothing})
    inputs = sample(op, name, dtype, DEVICE)
    check_values(op, inputs, "triton")
    check_gradients(op, inputs, "triton")


def test_whole_and_blocked_kernels_share_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever ran the forward, either backward can follow."""
    from cnm_kernels.triton import attention

    inputs = sample("gaussian_attention", "clips-50", torch.float32, DEVICE)
    every = {2: (1 << 20, 1 << 20), 4: (1 << 20, 1 << 20)}
    nothing = {2: (0, 0), 4: (0, 0)}
    for forward, backward in ((every, nothing), (nothing, every)):
        monkeypatch.setattr(attention, "WHOLE", {"attention": forward, "attention_backward": backward})
        check_gradients("gaussian_attention", inputs, "triton")


@pytest.mark.parametrize("blocked", [False, True])
def test_recomputed_probabilities_are_at_most_one(blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At scores of 1e9 a backward's products may round 64 higher than the forward's: as if its maximum were lower."""
    from cnm_kernels.triton import attention

    several = 0 if blocked else 1 << 20
    every = dict.fromkeys((2, 4), (several, several))
    monkeypatch.setattr(attention, "WHOLE", {"attention": every, "attention_backward": every})
    ops = torch.ops.cnm_kernels_triton
    draw = Draw("at most one", torch.float32, DEVICE)
    query, key, value = draw.normal(2, 2, 20, 16), draw.normal(2, 2, 24, 16), draw.normal(2, 2, 24, 16)
    weight = draw.uniform(2, 24) + 0.1
    options = (weight, None, None, 1.0, 0.1, False, False, None, 0.25)
    out, stats, _ = ops.attention(query, key, value, *options, False)
    stats[..., 0] -= 64
    d_out = torch.ones_like(out)
    d_query, d_key, d_value, d_weight, *_ = ops.attention_backward(
        d_out, None, query, key, value, *options, stats, True, True, True, True
    )
    assert (d_value <= query.size(2)).all()  # a sum of probabilities
    most = 2 * value.sum(-1).abs().max() * key.size(2)  # of a row's sum of P |dP - delta|
    assert d_query.abs().max() <= 0.25 * most * key.abs().max() * key.size(2)
    assert d_key.abs().max() <= 0.25 * most * query.abs().max() * query.size(2)
    assert (d_weight.abs() <= 2 * query.size(2) * most / weight).all()


def test_recomputed_probabilities_of_words_are_at_most_one() -> None:
    """Likewise, at logits of 1e9."""
    ops = torch.ops.cnm_kernels_triton
    draw = Draw("words at most one", torch.float32, DEVICE)
    hidden, weight, bias = draw.normal(3, 4, 16), draw.normal(40, 16), draw.normal(40)
    target, lengths = draw.integers(40, 3, 4), draw.lengths(4, 2, 1)
    nll, _, stats, expected = ops.linear_nll(hidden, weight, bias, target, lengths, 0.1, False, True)
    stats[0] -= 64
    _, d_weight, d_bias = ops.linear_nll_backward(
        torch.ones_like(nll), hidden, weight, bias, target, lengths, 0.1, stats, expected, False, True, True
    )
    assert d_bias.abs().max() <= hidden.size(0)  # each row's gradient is a mean over its tokens
    assert d_weight.abs().max() <= hidden.size(0) * hidden.abs().max()


@pytest.mark.parametrize("step", with_slow(STEPS, {"published", "recompute"}))
def test_a_training_step(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_trains_as_torch(step, "triton", monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
def test_the_interpreter_runs_only_when_asked_for() -> None:
    assert registry.choice("dropout", "cpu", torch.float32) != "triton"
    with cnm_kernels.use_backend("triton"):
        assert registry.choice("dropout", "cpu", torch.float32) == "triton"


def test_schemas_are_those_of_the_compiled_backend() -> None:
    if registry.unavailable("dropout", "native", "cpu", torch.float32) is not None:
        pytest.skip("the compiled module is not there to compare with")
    for file in op_list.kernel_files(library=False):
        for op in importlib.import_module(f"cnm_kernels.triton.{file}").SCHEMAS:
            ours = str(getattr(torch.ops.cnm_kernels_triton, op).default._schema)
            assert ours.replace("cnm_kernels_triton", "cnm_kernels") == str(
                getattr(torch.ops.cnm_kernels, op).default._schema
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lengths-0-1-odd-over", "odd"])
def test_the_loss_is_deterministic_with_padding(name: str, dtype: torch.dtype) -> None:
    check_deterministic("linear_nll", sample("linear_nll", name, dtype, DEVICE), "triton")


def test_tuning_keeps_the_fastest_that_runs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    autotune = importlib.import_module("cnm_kernels.triton.autotune")
    configurations = importlib.import_module("cnm_kernels.triton.configurations")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = ("attention", 2, 128 * 64)
    before = list(configurations.TABLE[key[:2]])
    wanted = configurations.Configuration(32, 0, 8, 3)

    def time(call) -> float:
        current = dict(configurations.TABLE[key[:2]])[key[2]]
        if current.rows == 16:
            raise RuntimeError("out of resource")
        return 1.0 if current == wanted else 2.0

    chosen, milliseconds = autotune.best(key, lambda: None, time)
    assert (chosen, milliseconds) == (wanted, 1.0)
    assert configurations.TABLE[key[:2]] == before
    autotune.write(configurations.tuned_path("A GPU"), {key: chosen})
    configurations.tuned.cache_clear()
    assert configurations.tuned("A GPU") == {key: wanted}
    configurations.tuned_path("A GPU").write_text('{"format": 99}')
    configurations.tuned.cache_clear()
    with pytest.warns(RuntimeWarning, match="no table of configurations"):
        assert configurations.tuned("A GPU") == {}
    configurations.tuned.cache_clear()


def test_classes_are_tuned_at_their_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a smaller one a configuration may be found that asks for too much shared memory at the largest."""
    autotune = importlib.import_module("cnm_kernels.triton.autotune")
    classes, sizes = autotune.configurations.class_of, set()

    def seen(kernel: str, operand: torch.Tensor, size: int) -> tuple[str, int, int]:
        sizes.add((kernel, operand.element_size(), size))
        return classes(kernel, operand, size)

    monkeypatch.setattr(autotune.configurations, "class_of", seen)
    attention, linear_nll = (importlib.import_module(f"cnm_kernels.triton.{op}") for op in ("attention", "linear_nll"))
    monkeypatch.setattr(attention, "forward", lambda *_: [None] * 3)
    monkeypatch.setattr(linear_nll, "forward", lambda *_: [None] * 4)
    for most in (99 << 10, 227 << 10):
        monkeypatch.setattr(attention, "shared_memory", lambda _, most=most: most)
        sizes.clear()
        assert {key for _, keys, _ in autotune.calls("meta") for key in keys} == sizes


@pytest.fixture
def tuned_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[torch.Tensor, Any]]:
    """A tensor of a GPU that is tuned for hidden states of up to 256 float32, and the configuration found."""
    autotune = importlib.import_module("cnm_kernels.triton.autotune")
    tuned, found = autotune.configurations.tuned, autotune.Configuration(128, 128, num_stages=3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with FakeTensorMode():  # before PyTorch is told of a GPU, which it would allocate on
        tensor = torch.empty(1, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    autotune.write(autotune.configurations.tuned_path("A GPU"), {("linear_nll", 4, 256): found})
    tuned.cache_clear()
    yield tensor, found
    tuned.cache_clear()


def test_what_was_tuned_serves_no_larger_size(tuned_gpu: tuple[torch.Tensor, Any]) -> None:
    configurations = importlib.import_module("cnm_kernels.triton.configurations")
    tensor, tuned = tuned_gpu
    found = [configurations.configuration("linear_nll", tensor, size) for size in (200, 256, 257, 512)]
    of_table = configurations.TABLE["linear_nll", 4][-1][1]
    assert found == [tuned, tuned, of_table, of_table]


def test_an_interrupted_tuning_leaves_the_last_one(
    tuned_gpu: tuple[torch.Tensor, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it does not use itself: what is timed is the candidate."""
    autotune = importlib.import_module("cnm_kernels.triton.autotune")
    configuration, timed = autotune.configurations.configuration, []
    tensor, tuned = tuned_gpu
    path = autotune.configurations.tuned_path("A GPU")
    before = path.read_text()

    def call() -> None:
        timed.append(configuration("linear_nll", tensor, 256))
        if len(timed) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(autotune, "calls", lambda _: iter([("loss", (("linear_nll", 4, 256),), (call,))]))
    monkeypatch.setattr("triton.testing.do_bench", lambda call: call() or 1.0)
    with pytest.raises(KeyboardInterrupt):
        autotune.main([])
    assert len(set(timed)) == 3
    assert tuned not in timed
    assert path.read_text() == before
    assert configuration("linear_nll", tensor, 256) == tuned


@pytest.mark.slow
def test_every_class_that_is_tuned_is_one_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls run too, at a hundredth of their size."""
    autotune = importlib.import_module("cnm_kernels.triton.autotune")
    configurations = importlib.import_module("cnm_kernels.triton.configurations")
    small = {384: 1, 128: 1, 8001: 40, 200: 70}
    for name in ("randn", "rand", "randint", "full", "zeros"):
        original = getattr(torch, name)

        def shrunk(*sizes, original=original, **options):
            def shrink(value):
                if isinstance(value, tuple):
                    return tuple(map(shrink, value))
                return small.get(value, value) if isinstance(value, int) else value

            return original(*map(shrink, sizes), **options)

        monkeypatch.setattr(autotune.torch, name, shrunk)
    seen = set()
    for _, keys, pair in autotune.calls(DEVICE):
        for key, call in zip(keys, pair, strict=True):
            assert key[2] in dict(configurations.TABLE[key[:2]])
            seen.add(key[0])
            call()
    assert {"attention", "attention_backward", "linear_nll", "linear_nll_backward"} <= seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_tuning_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module("cnm_kernels.triton.autotune").main([]) == 1
    assert capsys.readouterr().err == "autotune: needs an NVIDIA GPU\n"


@pytest.mark.parametrize(("M", "L"), [(5, 3), (3, 300), pytest.param(1030, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("graded", [False, True])
def test_active_tokens_are_listed_in_order(M: int, L: int, graded: bool) -> None:
    """Of several rows and tokens at a time: 1,024 and 128; a row whose gradient is 0 has none."""
    packed_tokens = importlib.import_module("cnm_kernels.triton.packed_tokens")
    generator = torch.Generator().manual_seed(M)
    lengths = torch.randint(-1, L + 2, (M,), generator=generator).to(DEVICE)
    gradient = torch.randn(M, generator=generator).to(DEVICE).where(torch.arange(M, device=DEVICE) % 3 != 1, 0.0)
    target = torch.randint(90, (M, L), generator=generator).to(DEVICE)
    stats = torch.randn(2, M, L, generator=generator).to(DEVICE)
    given = (gradient, target, stats) if graded else ()
    offsets, tokens, targets, notes = packed_tokens.pack(lengths, L, *given)
    active = torch.arange(L, device=DEVICE) < lengths[:, None]
    if graded:
        active &= (gradient != 0)[:, None]
    (wanted,) = active.flatten().nonzero(as_tuple=True)
    assert offsets.tolist() == [0, *active.sum(1).cumsum(0).tolist()]
    assert tokens[: len(wanted)].tolist() == wanted.tolist()
    if graded:
        assert targets[: len(wanted)].tolist() == target.flatten()[wanted].tolist()
        assert torch.equal(notes[:2, : len(wanted)], stats.flatten(1)[:, wanted])
        torch.testing.assert_close(notes[2, : len(wanted)], (gradient / lengths.clamp(1, L))[wanted // L])


@pytest.mark.parametrize("word", [-1, -100, 11])
def test_a_word_that_is_none_gives_nan(word: int) -> None:
    """A GPU cannot look at its words without waiting: no error can be raised, and no number made up."""
    inputs = vocabulary(Draw("words", torch.float32, DEVICE), 3, 5, 8, 11)
    inputs["target"][1, 2] = word
    inputs["valid_lengths"][1] = 4
    hidden = inputs["hidden"].requires_grad_()
    with cnm_kernels.use_backend("triton"):
        nll = cnm_kernels.linear_nll(**inputs)
    assert nll.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(nll.sum(), [hidden])
    assert gradient[1, 2].isnan().all()
    assert gradient[[0, 2]].isfinite().all()
