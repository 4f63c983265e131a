"""Triton's interpreter, which runs kernels on CPU for tests when TRITON_INTERPRET=1 was set before importing
it; and three mends for Triton 3.6's. It turns one-element arrays into integers in a way that NumPy 2.4
refuses, multiplies the bits of bfloat16 matrices as if they were integers, and prepares its language again
for every call inside a kernel, a third of the time."""

from __future__ import annotations

import importlib
from typing import Any, no_type_check

import numpy as np
import triton
import triton.language as tl


@triton.jit
@no_type_check
def _probe():
    pass


def interpreting() -> bool:
    """Whether kernels run in the interpreter: decided when they were defined, not by the variable now."""
    return not isinstance(_probe, triton.JITFunction)


def mend() -> None:
    """Apply the three mends, once."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor
    if patch.__module__ == __name__:
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    full_call = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.fn.__module__.startswith("equipoise."):
            return full_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)  # the kernel around it has prepared the language

    multiply = interpreter.InterpreterBuilder.create_dot

    def dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return multiply(self, widened(left), widened(right), *rest)

    def widened(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpretedFunction.__call__ = call
