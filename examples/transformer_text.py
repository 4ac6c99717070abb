"""A small transformer that learns to write a text file, character by character.

    python -m dhf.train --problem examples/transformer_text.py:build --steps 20
    torchrun --nproc_per_node=2 -m dhf.train --problem examples/transformer_text.py:build --options.text README.md --batch-size 64

The text is dhf's licence unless ``--options.text`` names another file. A sample is a window of the text with the same window one
character later as its target; the last tenth of the text is held out. Attention is written as usual: dhf chooses the kernel that
can be differentiated twice. The licence is so short that it is soon known by heart, and the held-out loss rises; a longer text
shows less of that.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import dhf

LICENCE = Path(__file__).resolve().parents[1] / "LICENSE"


class Block(torch.nn.Module):
    """Causal attention and two dense layers, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_dense = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.to_qkv, self.from_heads = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.dense = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.to_qkv(self.before_attention(x)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.from_heads(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.dense(self.before_dense(x))


class Transformer(torch.nn.Module):
    """Logits of the next character at each place: (N, T) integers to (N, characters, T)."""

    def __init__(self, characters: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(characters, width)
        self.places = torch.nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = torch.nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.head = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, characters))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        return self.head(self.blocks(x)).transpose(1, 2)  # cross-entropy wants classes second


class Windows(Dataset):
    """Windows of a text, half overlapping."""

    def __init__(self, ids: Tensor, length: int) -> None:
        self.ids, self.length, self.stride = ids, length, max(1, length // 2)

    def __len__(self) -> int:
        return max(0, (len(self.ids) - self.length - 1) // self.stride + 1)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        window = self.ids[i * self.stride :][: self.length + 1]
        return window[:-1], window[1:]


def build(text: str = "", length: int = 32, width: int = 32, heads: int = 2, blocks: int = 2) -> dhf.Problem:
    """The problem.

    Args:
        text: A text file; dhf's licence by default.
        length: Characters in a window.
        width: Of the embedding; a multiple of ``heads``.
        heads: Of the attention.
        blocks: Attention layers.
    """
    characters = Path(text or LICENCE).read_text(encoding="utf-8")
    alphabet = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids = torch.tensor([alphabet[c] for c in characters])
    kept = len(ids) * 9 // 10
    train, held_out = Windows(ids[:kept], length), Windows(ids[kept:], length)
    objective = dhf.Objective(Transformer(len(alphabet), length, width, heads, blocks), torch.nn.CrossEntropyLoss())
    return dhf.Problem(objective, train, validation=held_out if len(held_out) else None)
