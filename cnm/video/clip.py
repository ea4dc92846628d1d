"""CLIP's image encoder (Radford et al., 2021): a vision transformer that maps images to embeddings.

Parameters have open_clip's names, so that its files load. OpenAI's weights need QuickGELU.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cnm.errors import InputError

HEAD_WIDTH = 64  # of OpenAI's models, which parameters do not tell
WIDTHS = (768, 1024)  # theirs: 12 and 16 heads. Others' wider models have wider heads


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // HEAD_WIDTH, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return cast(Tensor, x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden)))  # QuickGELU


class _Transformer(nn.Module):
    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """Images [N, 3, size, size], normalised -> embeddings [N, embedding]."""

    def __init__(
        self,
        *,
        size: int = 224,
        patch: int = 32,
        width: int = 768,
        hidden: int = 3072,
        layers: int = 12,
        embedding: int = 512,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = _Transformer(width, hidden, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, embedding))

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> VisionTransformer:
        """Builds the encoder from its parameters; their shapes give its sizes. Of a whole CLIP it takes ``visual.*``.

        Raises:
            InputError: the parameters are not those of a CLIP vision transformer of one of OpenAI's widths.
        """
        visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
        state = visual or state
        try:
            width, _, patch, _ = state["conv1.weight"].shape
            if width not in WIDTHS:
                raise ValueError(f"{width} wide, OpenAI's are {' or '.join(map(str, WIDTHS))}")
            places = state["positional_embedding"].shape[0]
            hidden = state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
            layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.resblocks."))
            model = cls(
                size=patch * round((places - 1) ** 0.5),
                patch=patch,
                width=width,
                hidden=hidden,
                layers=layers,
                embedding=state["proj"].shape[1],
            )
            model.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"are not those of a CLIP vision transformer ({reason}); take OpenAI's weights") from None
        return model.eval()

    @property
    def size(self) -> int:
        return self.conv1.kernel_size[0] * round((len(self.positional_embedding) - 1) ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [N, places - 1, width]
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return cast(Tensor, self.ln_post(self.transformer(x)[:, 0]) @ self.proj)
