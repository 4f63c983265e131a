"""Set up before any test module is imported: no network, one thread, shapes checked, memory poisoned."""

import os

# Read once at import by the libraries below, so these come before everything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# cuBLAS refuses to run in deterministic mode without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import gc
from collections.abc import Iterator

# What is imported while a module of ours is imported would be compiled anew: the hook below has Python look
# for its own compiled files. The libraries that take longest come first, therefore.
import datasets  # noqa: F401
import peft  # noqa: F401
import pytest
import torch
from jaxtyping import install_import_hook
from transformers import LlamaForCausalLM, Trainer  # noqa: F401

# Kernels run on CPU in Triton's interpreter, which has to be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Only modules imported from here on are checked, so nothing above may import equipoise. Users never pay
# for these checks: outside pytest the annotations are inert.
install_import_hook("equipoise", "beartype.beartype")

# Tensors in tests are small and the workers already fill the cores.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """All that was imported stays: a training run's collections, at its end, would walk a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test's random numbers do not depend on which tests ran before it, or in which worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so an element that is read before it is written shows in the result."""
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filled = torch.utils.deterministic.fill_uninitialized_memory
    # The fill is active in deterministic mode only; warn_only, since the poison is all that is wanted of it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was_filled
    torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)
