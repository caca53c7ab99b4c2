"""What a Triton kernel costs on an architecture, found by compiling it offline: no device and no driver.

Imports Triton, so nothing that is imported with kvpass may import this.
"""

from kvpass.lowering.inspect.compile import Compiled, Source, compile_for
from kvpass.lowering.inspect.resources import MainLoop, Resources, resources
from kvpass.lowering.inspect.table import ARCHITECTURES, Architecture, architecture, roofline

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Compiled",
    "MainLoop",
    "Resources",
    "Source",
    "architecture",
    "compile_for",
    "resources",
    "roofline",
]
