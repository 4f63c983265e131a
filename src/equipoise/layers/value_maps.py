"""What a state keeps of values: their projection to fewer numbers, and the way back."""

from __future__ import annotations

import torch
from torch import nn

from equipoise.layers.feature_maps import orthogonal_gaussian
from equipoise.ops.types import ValueMaps


class NarrowValues(nn.Module):
    """Values of E numbers go into the state as vA of C, and what is read of it comes out as oB, of E.

    A state of F x C numbers tells as many keys apart as one of F x E: F says how many, and C how exactly the
    value of each comes back. Values of one head lie mostly in fewer than E directions.

    A starts as C orthogonal directions of length 1, B as its transpose: what is read is then the projection
    of what was written.

    Args:
        heads: h, the query heads that read.
        states: M, the states they read, each shared by h / M consecutive heads.
        size: E, what values have.
        narrow: C, what the state keeps of them.
    """

    def __init__(self, heads: int, states: int, size: int, narrow: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(states, size, narrow))
        self.up = nn.Parameter(torch.empty(heads, narrow, size))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw A from the generator; B follows."""
        states, size, narrow = self.down.shape
        for directions in self.down:
            square = orthogonal_gaussian(size, narrow, generator)
            directions.copy_(square / square.norm(dim=0))
        self.up.copy_(self.down.mT.repeat_interleave(self.up.shape[0] // states, 0))

    @property
    def maps(self) -> ValueMaps:
        """A [M, E, C] and B [h, C, E]."""
        return self.down, self.up
