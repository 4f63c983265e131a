"""Where the bytes of a hybrid's state go: which heads have a linear branch, how long windows are.

Everything is measured on the donor, by how far its predictions move; nothing is trained for it.
"""

from __future__ import annotations

from equipoise.allocation.allocate import Allocation, allocate

__all__ = ["Allocation", "allocate"]
