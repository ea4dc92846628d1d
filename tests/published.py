"""The published model and training step, written down plainly: the oracle of ``cnm.CNM`` and ``cnm.training.step``.

Ordinary PyTorch and nothing of this project. It spends what the published formulation spends (three branches one after
the other, every mask and score matrix in memory), so that it is also what the benchmarks call "published".
Time-major details of the original are written batch first; parameters carry the published state_dict names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEY_EPS = 1e-10
MAX_NORM = 10.0


@dataclass(frozen=True)
class CommonSizes:
    """Hyperparameters that both published networks have. ``vocab_size`` counts the padding id."""

    frame_dim: int
    word_dim: int
    vocab_size: int
    d_model: int
    num_heads: int


@dataclass(frozen=True)
class Sizes(CommonSizes):
    """Hyperparameters of the network."""

    num_layers1: int = 3
    num_layers2: int = 3
    alpha: float = 5.5
    max_width: float = 1.0
    input_dropout: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Output:
    """The results of a forward pass; branches are positive, hard, easy."""

    center: Tensor  # [B]
    width: Tensor  # [B]
    hidden: tuple[Tensor, Tensor, Tensor]  # [B, L, D] each
    nll: tuple[Tensor, Tensor, Tensor]  # [B] each


class Attention(nn.Module):
    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self, query: Tensor, source: Tensor, source_real: Tensor, key_weight: Tensor | None, causal: bool
    ) -> Tensor:
        """query [B, Lq, D] attends to the positions of source [B, Lk, D] where ``source_real`` [B, Lk] is True."""
        B, Lq, D = query.shape
        Lk, H = source.size(1), self.num_heads
        if query is source:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            q = F.linear(query, self.in_proj_weight[:D], self.in_proj_bias[:D])
            k, v = F.linear(source, self.in_proj_weight[D:], self.in_proj_bias[D:]).chunk(2, dim=-1)
        q = q * (D // H) ** -0.5
        q, k, v = (x.reshape(B, -1, H, D // H).transpose(1, 2).reshape(B * H, -1, D // H) for x in (q, k, v))

        scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, Lq, Lk)
        if causal:
            future = torch.ones(Lq, Lk, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -1e30)
        scores = scores.masked_fill(~source_real[:, None, None, :], -1e30)
        probability = torch.softmax(scores, dim=-1)
        if key_weight is not None:
            probability = probability * (key_weight[:, None, None, :] + KEY_EPS)
            probability = probability / probability.sum(dim=-1, keepdim=True)

        out = torch.bmm(probability.view(B * H, Lq, Lk), v)
        return self.out_proj(out.view(B, H, Lq, D // H).transpose(1, 2).reshape(B, Lq, D))


class Layer(nn.Module):
    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = Attention(d_model, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(d_model)
        self.encoder_attn = Attention(d_model, num_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(d_model)
        self.fc1 = nn.Linear(d_model, 2 * d_model)
        self.fc2 = nn.Linear(2 * d_model, d_model)
        self.final_layer_norm = nn.LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        real: Tensor,
        key_weight: Tensor | None,
        source: Tensor | None,
        source_real: Tensor | None,
        source_weight: Tensor | None,
    ) -> Tensor:
        update = self.self_attn(x, x, real, key_weight, causal=True)
        x = self.self_attn_layer_norm(x + F.dropout(update, self.dropout, self.training))
        if source is not None:
            assert source_real is not None
            update = self.encoder_attn(x, source, source_real, source_weight, causal=False)
            x = self.encoder_attn_layer_norm(x + F.dropout(update, self.dropout, self.training))
        update = self.fc2(F.relu(self.fc1(x)))
        return self.final_layer_norm(x + F.dropout(update, self.dropout, self.training))


class Decoder(nn.Module):
    def __init__(self, num_layers: int, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.decoder_layers = nn.ModuleList([Layer(d_model, num_heads, dropout) for _ in range(num_layers)])

    def forward(
        self,
        x: Tensor,
        real: Tensor,
        key_weight: Tensor | None = None,
        source: Tensor | None = None,
        source_real: Tensor | None = None,
        source_weight: Tensor | None = None,
    ) -> Tensor:
        for layer in self.decoder_layers:
            x = layer(x, real, key_weight, source, source_real, source_weight)
        return x


class PublishedCNM(nn.Module):
    """frames [B, T, frame_dim], words [B, L + 1, word_dim] (row 0 is overwritten), word_ids [B, L]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        D = sizes.d_model
        self.sizes = sizes
        self.frame_fc = nn.Linear(sizes.frame_dim, D)
        self.word_fc = nn.Linear(sizes.word_dim, D)
        self.mask_vec = nn.Parameter(torch.zeros(sizes.word_dim))
        self.start_vec = nn.Parameter(torch.zeros(sizes.word_dim))
        self.trans = nn.Module()
        self.trans.decoder1 = Decoder(sizes.num_layers1, D, sizes.num_heads, sizes.dropout)
        self.trans.decoder2 = Decoder(sizes.num_layers2, D, sizes.num_heads, sizes.dropout)
        self.fc_rec = nn.Linear(D, sizes.vocab_size)
        self.fc_mask_gen = nn.Linear(D, 2)

    def project(self, frames: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs in model width; the start token in row 0 of the words; no positions yet."""
        words = words.clone()
        words[:, 0] = self.start_vec
        frames = self.frame_fc(F.dropout(frames, self.sizes.input_dropout, self.training))
        words = self.word_fc(F.dropout(words, self.sizes.input_dropout, self.training))
        return frames, words

    def generate(self, frames: Tensor, frame_real: Tensor, words: Tensor, word_real: Tensor) -> tuple[Tensor, Tensor]:
        """Decoding 1, on projected inputs: center and width [B]."""
        words = words + positions(words.size(1), words.size(2)).to(words)
        words = self.trans.decoder2(words, word_real)
        states = self.trans.decoder1(frames, frame_real, None, words, word_real, None)
        center_width = torch.sigmoid(self.fc_mask_gen(states[:, -1]))
        return center_width[:, 0], center_width[:, 1] * self.sizes.max_width

    def localize(
        self, frames: Tensor, frame_lengths: Tensor, words: Tensor, word_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        frame_real, word_real = within(frame_lengths, frames.size(1)), within(word_lengths + 1, words.size(1))
        frames, words = self.project(frames, words)
        return self.generate(frames, frame_real, words, word_real)

    def forward(
        self,
        frames: Tensor,
        frame_lengths: Tensor,
        words: Tensor,
        word_ids: Tensor,
        word_lengths: Tensor,
        masked_words: Tensor,
    ) -> Output:
        T, L = frames.size(1), word_ids.size(1)
        frame_real, word_real = within(frame_lengths, T), within(word_lengths + 1, L + 1)
        frames, words = self.project(frames, words)
        center, width = self.generate(frames, frame_real, words, word_real)

        keep = torch.linspace(0, T - 1, T // 4).long()
        frames, frame_real = frames[:, keep], frame_real[:, keep]
        words = torch.where(masked_words[:, :, None], self.word_fc(self.mask_vec), words)
        words = (words + positions(L + 1, words.size(2)).to(words))[:, :-1]
        word_real = word_real[:, :-1]

        weight = gaussian(center, width, T // 4, self.sizes.alpha)
        hidden, nll = [], []
        for branch in (weight, None, 1 - weight):  # positive, hard negative, easy negative
            source = self.trans.decoder1(frames, frame_real, branch)
            state = self.trans.decoder2(words, word_real, None, source, frame_real, branch)
            hidden.append(state)
            nll.append(self.branch_nll(state, word_ids, word_real))
        return Output(center, width, tuple(hidden), tuple(nll))

    def branch_nll(self, state: Tensor, word_ids: Tensor, word_real: Tensor) -> Tensor:
        return nll_loss(self.fc_rec(state), word_ids, word_real)


def within(lengths: Tensor, size: int) -> Tensor:
    """[B] -> [B, size], True at the first ``lengths`` positions."""
    return torch.arange(size, device=lengths.device)[None] < lengths[:, None]


def positions(length: int, d_model: int) -> Tensor:
    """Sinusoids, sines in the first half and cosines in the second; position 0 is the padding index, hence zero."""
    half = d_model // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / (half - 1)))
    angle = torch.arange(length, dtype=torch.float)[:, None] * frequency[None]
    table = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    table[0] = 0
    return table


def gaussian(center: Tensor, width: Tensor, length: int, alpha: float) -> Tensor:
    """exp(-alpha (x - c)^2 / max(w, 0.1)^2) at ``length`` points of [0, 1]. [B] -> [B, length]"""
    x = torch.linspace(0, 1, length, dtype=center.dtype, device=center.device)
    return torch.exp(-alpha * (x[None] - center[:, None]) ** 2 / width[:, None].clamp(min=0.1) ** 2)


def nll_loss(logits: Tensor, word_ids: Tensor, real: Tensor, smoothing: float = 0.1) -> Tensor:
    """Label-smoothed nll, averaged over each sentence's real rows. [B, L, V], [B, L], [B, L] -> [B]"""
    log_p = logits.log_softmax(dim=-1)
    picked = log_p.gather(-1, word_ids[:, :, None])[:, :, 0]
    token = -(1 - smoothing) * picked - smoothing * log_p.mean(dim=-1)
    return (token * real).sum(dim=1) / real.sum(dim=1)


def reconstruction_loss(output: Output) -> Tensor:
    return output.nll[0].mean() + output.nll[1].mean()


def contrastive_loss(output: Output, beta_1: float, beta_2: float) -> Tensor:
    positive, hard, easy = output.nll
    zero = torch.zeros_like(positive)
    return torch.max(positive - hard + beta_1, zero).mean() + torch.max(positive - easy + beta_2, zero).mean()


def clip(gradients: list[Tensor]) -> Tensor:
    """Scales the gradients, in place, to a common norm of at most ``MAX_NORM``; returns the norm they had."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(min(1.0, MAX_NORM / (norm.item() + 1e-6)))
    return norm


class PublishedAdam:
    """Adam whose eps is added before bias correction; weight decay shrinks the parameter first."""

    def __init__(self, parameters: list[Tensor], weight_decay: float) -> None:
        self.parameters, self.weight_decay = parameters, weight_decay
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]
        self.updates = 0

    @torch.no_grad()
    def step(self, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.updates += 1
        for p, mean, square in zip(self.parameters, self.mean, self.square, strict=True):
            mean.copy_(beta1 * mean + (1 - beta1) * p.grad)
            square.copy_(beta2 * square + (1 - beta2) * p.grad**2)
            rate = lr * math.sqrt(1 - beta2**self.updates) / (1 - beta1**self.updates)
            p.sub_(self.weight_decay * lr * p)
            p.sub_(rate * mean / (square.sqrt() + eps))


def learning_rate(updates: int, lr: float, warmup_updates: int, warmup_init_lr: float) -> float:
    """The rate after ``updates`` updates."""
    if updates < warmup_updates:
        return warmup_init_lr + updates * (lr - warmup_init_lr) / warmup_updates
    return lr * math.sqrt(warmup_updates / updates)


@dataclass(frozen=True)
class Schedule:
    """One optimizer's settings."""

    lr: float
    warmup_updates: int
    warmup_init_lr: float
    weight_decay: float = 0.0


class PublishedStep:
    """Both updates of one batch; which parameters train is switched by ``requires_grad``, as published."""

    def __init__(
        self, model: PublishedCNM, reconstructor: Schedule, generator: Schedule, beta_1: float, beta_2: float
    ) -> None:
        self.model, self.betas = model, (beta_1, beta_2)
        self.schedules = {"reconstructor": reconstructor, "generator": generator}
        self.parameters = {
            "reconstructor": [p for name, p in model.named_parameters() if "mask_gen" not in name],
            "generator": [p for name, p in model.named_parameters() if "mask_gen" in name],
        }
        self.adam = {
            group: PublishedAdam(parameters, self.schedules[group].weight_decay)
            for group, parameters in self.parameters.items()
        }

    def __call__(self, inputs: tuple[Tensor, ...], masked_words: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """inputs: (frames, frame_lengths, words, word_ids, word_lengths)"""
        self.train_only("reconstructor")
        first = reconstruction_loss(self.model(*inputs, masked_words[0]))
        first_norm = self.update("reconstructor", first)
        self.train_only("generator")
        second = contrastive_loss(self.model(*inputs, masked_words[1]), *self.betas)
        second_norm = self.update("generator", second)
        self.train_only(None)
        return {
            "loss/reconstruction": first.detach(),
            "loss/contrastive": second.detach(),
            "grad_norm/reconstructor": first_norm,
            "grad_norm/generator": second_norm,
        }

    def train_only(self, group: str | None) -> None:
        for name, parameters in self.parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(group is None or name == group)

    def update(self, group: str, loss: Tensor) -> Tensor:
        for parameter in self.parameters[group]:
            parameter.grad = None  # the other group keeps its last, clipped gradients, and they count below
        loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = clip(gradients)
        adam, schedule = self.adam[group], self.schedules[group]
        adam.step(learning_rate(adam.updates, schedule.lr, schedule.warmup_updates, schedule.warmup_init_lr))
        return norm
