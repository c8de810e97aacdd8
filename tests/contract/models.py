"""Small models in the shapes that device maps get wrong: nested, uneven, tied."""

from __future__ import annotations

import random

import torch
from torch import nn


class Block(nn.Module):
    """A module that tests may ask not to split."""


class Part(nn.Module):
    """A module that may be split."""


def nested(seed: int, depth: int = 3) -> nn.Module:
    """A random tree of blocks, parts and layers of random sizes, on meta. No name occurs twice in it."""
    rng = random.Random(seed)
    with torch.device("meta"):
        return _nested(rng, depth)


def _nested(rng: random.Random, depth: int) -> nn.Module:
    module = rng.choice((Block, Part))()
    for _ in range(rng.randint(1, 4)):
        child = _nested(rng, depth - 1) if depth and rng.random() < 0.6 else _layer(rng)
        module.add_module(f"x{rng.getrandbits(40):x}", child)
    return module


def _layer(rng: random.Random) -> nn.Module:
    kind = rng.randrange(5)
    if kind == 0:
        return nn.ReLU()
    if kind == 1:
        return nn.LayerNorm(rng.randint(1, 8))
    return nn.Linear(rng.randint(1, 8), rng.randint(1, 8), bias=rng.random() < 0.7)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class LanguageModel(nn.Module):
    """Embedding, layers, a head that is tied to the embedding or not."""

    def __init__(self, layers: int = 4, width: int = 8, vocabulary: int = 32, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class MaskedHead(nn.Module):
    """A head whose decoder shares its weight with the embedding and its bias with the head itself."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.decoder = nn.Linear(width, vocabulary)
        self.decoder.bias = self.bias


class MaskedLanguageModel(nn.Module):
    """Two ties that cross: the shape of Camembert and XLM-RoBERTa."""

    def __init__(self, layers: int = 3, width: int = 8, vocabulary: int = 32) -> None:
        super().__init__()
        self.roberta = nn.Module()
        self.roberta.embeddings = nn.Embedding(vocabulary, width)
        self.roberta.encoder = nn.ModuleList(Layer(width) for _ in range(layers))
        self.lm_head = MaskedHead(width, vocabulary)
        self.lm_head.decoder.weight = self.roberta.embeddings.weight


class Translator(nn.Module):
    """One table under four names, and a buffer of the model's own: the shape of Marian."""

    def __init__(self, layers: int = 2, width: int = 8, vocabulary: int = 32, positions: int = 256) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.shared = nn.Embedding(vocabulary, width)
        for side in ("encoder", "decoder"):
            stack = nn.Module()
            stack.embed_tokens = nn.Embedding(vocabulary, width)
            stack.embed_tokens.weight = self.model.shared.weight
            stack.embed_positions = nn.Embedding(positions, width)
            stack.layers = nn.ModuleList(Layer(width) for _ in range(layers))
            self.model.add_module(side, stack)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.model.shared.weight
        self.register_buffer("final_logits_bias", torch.zeros(1, vocabulary))
