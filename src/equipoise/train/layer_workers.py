"""Ranks of torchrun as workers that share a folder: layers are independent, so ranks need not talk."""

from __future__ import annotations

import os

import torch

_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
)


def take_rank() -> int:
    """This process's rank under torchrun, else 0; the environment forgets it, and the rank's GPU is taken.

    What trains a layer would otherwise share out batches among the ranks.
    """
    rank, local = int(os.environ.get("RANK", 0)), os.environ.get("LOCAL_RANK")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and local is not None and torch.cuda.is_available():
        torch.cuda.set_device(int(local) % torch.cuda.device_count())
    for name in _RANKS:
        os.environ.pop(name, None)
    return rank
