"""Offline compilation: one specialised Triton kernel to the machine code of an architecture, without a device.

``triton.compile`` asks a driver only for the target and at the first launch, so with a target given none is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from kvpass.lowering.architectures import architecture

Compiled: TypeAlias = CompiledKernel
ALIGNED = (("tt.divisibility", 16),)


@dataclass(frozen=True)
class Source:
    """One specialised kernel.

    Attributes:
        function: what ``triton.jit`` returned.
        signature: type of every argument by name: ``"*bf16"``, ``"i32"``, ``"fp32"``, ``"constexpr"``.
        constants: value of every argument that is a ``"constexpr"``.
        attributes: arguments that are divisible by 16: pointers in bytes, integers as they are.
        options: options of the back end, ``num_warps`` and ``num_stages`` above all.
    """

    function: JITFunction[object]
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    attributes: frozenset[str] = frozenset()
    options: Mapping[str, object] = field(default_factory=dict)

    def check(self) -> None:
        """Raises:
        TypeError: ``function`` is not a compiled one, as when ``TRITON_INTERPRET`` was set where it was decorated.
        ValueError: the names do not fit together.
        """
        if not isinstance(self.function, JITFunction):
            raise TypeError(f"{self.function!r} is no JITFunction; was it decorated under TRITON_INTERPRET?")
        constant = {name for name, type in self.signature.items() if type == "constexpr"}
        for what, given, wanted in (
            ("the signature names", set(self.signature), set(self.function.arg_names)),
            ("the constants are", set(self.constants), constant),
            ("the attributes are of", self.attributes, self.attributes & (set(self.signature) - constant)),
        ):
            if given != wanted:
                raise ValueError(f"{self.function.__name__}: {what} {sorted(given)}, expected {sorted(wanted)}")


def compile_for(source: Source, arch: str) -> Compiled:
    """The kernel for ``arch``, a name of the architecture table. Triton's disk cache is used as ever.

    Raises:
        ValueError: an unknown architecture, or names that do not fit together.
        TypeError: ``source.function`` cannot be compiled at all.
        triton.errors.TritonError: the kernel does not compile; where ptxas is what fails, Triton prints the PTX too.
    """
    device = architecture(arch)
    source.check()
    places = source.function.arg_names
    return triton.compile(
        ASTSource(
            source.function,
            {name: source.signature[name] for name in places},
            dict(source.constants),
            {(places.index(name),): [list(pair) for pair in ALIGNED] for name in source.attributes},
        ),
        target=GPUTarget(device.backend, device.target, device.warp),
        options=dict(source.options),
    )
