"""Compile the Triton kernels for Hopper, without a device: `compile_kernels.py HEAD_DIM FEATURES [NAME]`.

Prints shared memory and, where the compiler's tool is at hand, registers and stack of each. The interpreter
takes more than the compiler does, so passing there is not enough. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from equipoise.ops.triton import (
    backward_kernels,
    forward_kernels,
    key_kernels,
    mapped_key_kernels,
    step_kernel,
    transfer_kernels,
)
from equipoise.ops.triton.configs import CONFIGS, Config
from equipoise.ops.triton.decode import SLOTS
from equipoise.ops.triton.transfer import WIDTH

KERNELS = (
    forward_kernels.fold_kernel, forward_kernels.attend_kernel, backward_kernels.rows_kernel,
    backward_kernels.unfold_kernel, key_kernels.window_keys_kernel, key_kernels.linear_keys_kernel,
    step_kernel.step_kernel, transfer_kernels.transfer_kernel, transfer_kernels.transfer_queries_kernel,
    transfer_kernels.transfer_keys_kernel, mapped_key_kernels.mapped_keys_kernel,
)  # fmt: skip
INPUTS = {
    "q", "k", "v", "map_q", "map_k", "phi_q", "phi_k", "out", "grad", "grad_q", "grad_k", "grad_phi_q",
    "grad_phi_k", "grad_projected", "keys", "values", "features", "new_keys", "new_values", "new_features",
    "pending_features", "pending_values",
}  # fmt: skip
SUMS = {
    "weight_window", "weight_linear", "initial", "initial_z", "states", "states_z", "final", "final_z",
    "shifts", "pulls", "drifts", "excesses", "far_pulls", "far_drifts", "grads", "grads_z", "grad_v",
    "grad_window", "grad_linear", "sums", "totals", "new_sums", "new_totals", "gate", "logsumexps", "losses",
}  # fmt: skip
OTHERS = {
    "valid": "*i8", "new_valid": "*i8", "segments": "*i32", "first_segment": "*i32", "largest": "*i32",
    "pending": "*i32", "new_pending": "*i32", "folded": "*i64", "new_folded": "*i64", "scale": "fp32",
    "softcap": "fp32",
}  # fmt: skip


def constants(
    kernel: Any, config: Config, size: int, features: int, operand: Any, shared: bool, mapped: bool
) -> dict[str, Any]:
    """What a kernel is compiled with."""
    columns = features // 2
    known = {
        "D": size, "E": size, "F": features, "C": columns, "BLOCK_D": size, "BLOCK_E": size,
        "BLOCK_C": columns, "BLOCK_F": columns if mapped else min(config.features, features),
        "BLOCK_Q": config.queries, "BLOCK_K": config.keys, "CHUNK": config.chunk,
        "STEP": min(config.features, size), "MAPPED": mapped,
        "R": 63, "BLOCK_R": 64, "HEADS": 16, "SLOTS": SLOTS, "OPERAND": operand, "SUM": tl.float32,
        "SHARED": shared, "LAGGING": shared, "CALIBRATED": False, "HAS_TOTALS": False,
        "WIDTH": min(WIDTH, features), "FLOOR": 1e-12,
    }  # fmt: skip
    if kernel.fn.__name__ in ("fold_kernel", "unfold_kernel", "step_kernel"):
        known["BLOCK_E"] = 32
    return {name: known.get(name, True) for name in kernel.arg_names if name.isupper() and name not in "HNM"}


def compiled(
    kernel: Any, config: Config, size: int, features: int, kind: str, shared: bool, mapped: bool
) -> str:
    """One line about the compiled kernel."""
    operand = tl.bfloat16 if kind == "bf16" else tl.float32
    fixed = constants(kernel, config, size, features, operand, shared, mapped)

    def type_of(name: str) -> str:
        if name in INPUTS:
            return f"*{kind}"
        return "*fp32" if name in SUMS else OTHERS.get(name, "i32")

    signature = {name: "constexpr" if name in fixed else type_of(name) for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(
        kernel, signature, constexprs=fixed, attrs={(i,): [["tt.divisibility", 16]] for i in pointers}
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    line = f"{kernel.fn.__name__}{' with maps' * mapped} {kind} shared memory {result.metadata.shared}"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.asm["cubin"])
            file.flush()
            printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        line += "".join(f" {x.strip()}" for x in printed.splitlines() if "REG" in x)
    return line


def main(size: int, features: int, only: str = "") -> None:
    """16-bit numbers in every configuration, float32 in the one meant for it."""
    for config, kernel in itertools.product(CONFIGS, KERNELS):
        name = kernel.fn.__name__
        if only not in name or (name == "mapped_keys_kernel" and not config.maps):
            continue
        kind = "fp32" if config is CONFIGS[-1] else "bf16"
        shared = (False, True) if {"SHARED", "LAGGING"} & set(kernel.arg_names) else (False,)
        mapped = (False, True)[: 1 + config.maps] if "MAPPED" in kernel.arg_names else (False,)
        for options in itertools.product(shared, mapped):
            line = compiled(kernel, config, size, features, kind, *options)
            print(config.chunk, config.keys, line, flush=True)


if __name__ == "__main__":
    main(*(int(x) for x in sys.argv[1:3]), *sys.argv[3:])
