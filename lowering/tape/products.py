"""Products of rows with a matrix: the kernel that streams matrices through a few rows, and who takes many."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvpass.ir import address
from kvpass.lowering import build, cpp
from kvpass.lowering.specialise import specialise
from kvpass.lowering.tape.words import TYPES

SOURCE = cpp.SOURCE.with_name("linear.cpp")
_STREAMED = 48  # rows up to which the kernel is ahead of PyTorch's float32 product: 1.4 times at 24, 1.1 at 48


@functools.cache
def kernel(dtype: torch.dtype, weight: torch.dtype) -> int:
    """The address of the kernel of products; the library stays loaded.

    Raises:
        NoCompiler: the source cannot be compiled here.
    """
    facts = {"general": False, "element": TYPES[dtype], "weight": TYPES[weight]}
    library = build.load(specialise(SOURCE.read_text(), facts, "//"))
    return ctypes.cast(library.kvpass_linear, ctypes.c_void_p).value or 0


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[()]:
    """``out = x @ weight + bias``.

    Args:
        x: ``[rows, in]``, dense, as ``out`` is.
        weight: ``[in, out]`` of the type of ``x``, or bytes that stand for such numbers.
    """
    inner, outer = weight.stride()
    if 1 in (inner, outer) and len(x) <= _most_streamed(x.dtype):
        call, scratch = _call(kernel(x.dtype, weight.dtype)), torch.empty(x.numel())
        of_bias = 0 if bias is None else address(bias)
        features, row, crossed = out.shape[1], outer if inner == 1 else inner, int(inner != 1)
        matrix = np.array([address(weight), of_bias, out.data_ptr(), features, features, row, crossed], np.int64)
        call(
            x.data_ptr(), x.shape[1], len(x), x.shape[1], matrix.ctypes.data, 1, torch.get_num_threads(),
            scratch.data_ptr(),
        )  # fmt: skip
    elif bias is None:
        torch.mm(x, weight.to(x.dtype), out=out)
    else:
        torch.addmm(bias, x, weight.to(x.dtype), out=out)
    return ()


@functools.cache
def _most_streamed(dtype: torch.dtype) -> float:
    """Rows up to which the kernel is ahead: PyTorch multiplies 16-bit numbers well where the processor has an
    instruction for it, and at a third of the speed of float32 or less where it has none.
    """
    if dtype is torch.float32 or platform.machine() not in ("x86_64", "AMD64"):
        return _STREAMED
    has = torch.cpu._is_avx512_bf16_supported if dtype is torch.bfloat16 else torch.cpu._is_amx_fp16_supported
    return 0 if has() else float("inf")


@functools.cache
def _call(address: int) -> Callable[..., None]:
    whole, place = ctypes.c_int64, ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, place, whole, whole, whole, place, whole, whole, place)(address)
