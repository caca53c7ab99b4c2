"""The kernels of a generated Triton module, as `kvpass.lowering.inspect` compiles them without a device.

Imports Triton, so nothing that is imported with kvpass may import this.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from sympy.core.function import AppliedUndef

from kvpass.ir import Attention, Read, Step
from kvpass.lowering.inspect import Source
from kvpass.lowering.triton import load, source
from kvpass.lowering.triton_config import Config, config

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPERANDS = ("query", "keys", "values", "out")
_TABLES = ("key_table", "value_table")
_PARTS = ("parts", "mosts", "totals")


def offline(spec: Attention, arch: str, new: int = 1, splits: int = 32, how: Config | None = None) -> Source:
    """The kernel that reads keys and values, specialised as a launch does where all strides are divisible by 16.

    Args:
        new: rows of the call, which a decode kernel's tile depends on. splits: of a decode kernel.
    """
    how = how or config(spec, arch)
    module = load(source(spec, arch, how=how))
    kernel = module.decode if spec.step is Step.DECODE else module.prefill
    block = min(how.block_m, max(16, triton.next_power_of_2(new * spec.group)))
    constants = {"SHARED": True, "DIRECT": splits == 1, "BLOCK_M": block}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    tables = "*i32" if spec.page_size else f"*{_TYPES[spec.dtype]}"  # a launch gives what is there and is not read
    signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= dict.fromkeys(_OPERANDS, f"*{_TYPES[spec.dtype]}") | dict.fromkeys(_TABLES, tables)
    signature |= {name: "*fp32" for name in _PARTS if name in signature}
    signature["reads"] = tuple((f"*{_TYPES[read.dtype]}", *["i32"] * (_axes(spec, read) - 1)) for read in spec.reads)
    strides = {name for name in kernel.arg_names if name[1:2] == "_"}
    if spec.page_size is None:
        strides |= {"key_row", "value_row"}
    return Source(
        kernel,
        signature,
        constants,
        frozenset({*_OPERANDS, *_TABLES, *(set(_PARTS) & set(signature)), *strides}),
        how.options,
    )


def _axes(spec: Attention, read: Read) -> int:
    """How many axes a read has: in a support one for each argument."""
    calls = [len(call.args) for call in spec.support.atoms(AppliedUndef) if call.func.__name__ == read.name]
    return len(read.axes) or max(calls)
