"""A small causal transformer of characters (Vaswani et al. 2017; norms before each part, as GPT-2 has them).

x <- embedding of the character + embedding of its place
x <- x + attention(norm(x)),  x <- x + mlp(norm(x))     once a block
logits = head(norm(x))
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad_lab.models.architecture import Architecture


@dataclass(frozen=True)
class Transformer(Architecture):
    """Blocks of attention and a two-layer perceptron; every layer is one that curvature knows."""

    blocks: int = 2
    """Number of blocks."""
    width: int = 64
    """Numbers that stand for a character."""
    heads: int = 4
    """Parts of the width that attend on their own."""
    tied: bool = False
    """The head shares the weight of the characters' embedding (Press and Wolf 2017)."""

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks} must be positive; set --model.blocks")
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"width={self.width} cannot be shared by heads={self.heads}; give a multiple of the heads")

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return Characters(shape[-1], classes, self.blocks, self.width, self.heads, self.tied)


class Characters(nn.Module):
    """x [n, places] of character numbers -> logits [n, places, characters] of the next ones."""

    def __init__(self, places: int, classes: int, blocks: int, width: int, heads: int, tied: bool = False) -> None:
        super().__init__()
        self.letters = nn.Embedding(classes, width)
        self.places = nn.Embedding(places, width)
        self.blocks = nn.Sequential(*(Block(width, heads, blocks) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for embedding in (self.letters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if tied:
            self.head.weight = self.letters.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return self.head(self.norm(self.blocks(self.letters(x) + self.places(places))))


class Block(nn.Module):
    """x [n, places, width] -> the same, with attention and a perceptron added."""

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.query, self.key, self.value, self.out, self.grow, self.shrink):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        for layer in (self.out, self.shrink):  # so that depth does not add to the sum's variance (GPT-2)
            layer.weight.data /= (2 * blocks) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.shrink(F.gelu(self.grow(self.norm2(x))))

    def attention(self, x: Tensor) -> Tensor:
        """Each place looks at itself and at those before it."""
        n, places, width = x.shape
        parts = (
            layer(x).view(n, places, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.out(seen.transpose(1, 2).reshape(n, places, width))
