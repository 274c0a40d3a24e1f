"""Prompts of several lengths in one batch, and random vectors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steering_vectors import SteeringVector

S = 6  # columns of the prompts


def padded_prompts(pads: Sequence[int]) -> dict[str, Tensor]:
    "A row for each of `pads`, which tells how many columns of padding it begins with."
    ids = torch.randint(3, 90, (len(pads), S), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for r, n in enumerate(pads):
        mask[r, :n] = 0
        ids[r, :n] = 0
    return {"input_ids": ids, "attention_mask": mask}


def random_vector(model: Any, layers: Sequence[int], seed: int = 3) -> SteeringVector:
    "A random direction for each layer, in float64."
    g = torch.Generator().manual_seed(seed)
    return SteeringVector({n: torch.randn(model.config.hidden_size, generator=g, dtype=torch.float64) for n in layers})
