"""Where the bytes of a hybrid's state go: which heads have a linear branch, how long windows are.

Everything is measured on the donor, by how far its predictions move; nothing is trained for it.
"""

from __future__ import annotations

from equipoise.models.allocation.budget import Allocation, allocate, budget_of

__all__ = ["Allocation", "allocate", "budget_of"]
