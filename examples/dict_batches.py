"""A model in the style of Hugging Face: batches are dictionaries, outputs an object with ``.logits``, padding is not counted.

    python -m dhf.train --problem examples/dict_batches.py:build --steps 15
    torchrun --nproc_per_node=2 -m dhf.train --problem examples/dict_batches.py:build

What is to be overridden for one's own model stands in ``TokenTagging``: how outputs come from a batch, what the loss is, and how
much a batch counts. The task: of each letter of a word, say whether it occurs in the word again. Words differ in length, so a
``collate_fn`` pads them; labels of the padding are -100, and neither the loss nor the count looks at them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import dhf

LETTERS, PADDING, IGNORED = 12, 0, -100


@dataclasses.dataclass
class TaggerOutput:
    """What the model returns."""

    logits: Tensor  # (N, T, 2)


class Tagger(torch.nn.Module):
    """Embedding, attention over the word, and two logits per letter."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(LETTERS + 1, width)
        self.attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.classify = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, 2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TaggerOutput:
        x = self.embed(input_ids)
        around, _ = self.attention(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)
        return TaggerOutput(self.classify(x + around))


class TokenTagging(dhf.Objective):
    """The mean cross-entropy over all letters that are not padding."""

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        found = self.module(batch["input_ids"], attention_mask=batch["attention_mask"])
        return found.logits

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)

    def count(self, batch: dict[str, Tensor]) -> float:
        return int((batch["labels"] != IGNORED).sum())  # what the mean is over, so that uneven batches add up


def build(words: int = 600, longest: int = 10, width: int = 24, heads: int = 2) -> dhf.Problem:
    """The problem.

    Args:
        words: In the training data.
        longest: Letters in a word, at most.
        width: Of the embedding; a multiple of ``heads``.
        heads: Of the attention.
    """
    train, held_out = draw(words, longest, seed=1), draw(100, longest, seed=2)
    objective = TokenTagging(Tagger(width, heads))

    def metrics(module: torch.nn.Module) -> dict[str, float]:
        batch = {key: value.to(next(module.parameters()).device) for key, value in pad(held_out).items()}
        with torch.no_grad():
            guesses, counted = objective.outputs(batch).argmax(-1), batch["labels"] != IGNORED
        return {"accuracy": float((guesses == batch["labels"])[counted].float().mean())}

    return dhf.Problem(
        objective,
        DataLoader(
            train, batch_size=64, collate_fn=pad
        ),  # of a loader dhf takes samples, collate_fn and micro-batch size
        validation=DataLoader(held_out, batch_size=100, collate_fn=pad),
        metrics=metrics,
    )


def draw(words: int, longest: int, seed: int) -> list[dict[str, Tensor]]:
    """Words of random letters, each with its labels."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (words,), generator=random)
    drawn = [torch.randint(1, LETTERS + 1, (int(n),), generator=random) for n in lengths]
    return [{"input_ids": ids, "labels": ((ids == ids[:, None]).sum(0) > 1).long()} for ids in drawn]


def pad(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as long as its longest word."""
    fill = {"input_ids": PADDING, "labels": IGNORED}
    batch = {
        key: torch.nn.utils.rnn.pad_sequence([s[key] for s in samples], batch_first=True, padding_value=value)
        for key, value in fill.items()
    }
    return {**batch, "attention_mask": (batch["input_ids"] != PADDING).long()}
