"""What a Triton kernel costs on an architecture, found by compiling it offline: no device and no driver.

Imports Triton, so nothing that is imported with kvpass may import this.
"""

from kvpass.lowering.architectures import ARCHITECTURES, Architecture, architecture, roofline
from kvpass.lowering.inspect.compile import Compiled, Source, compile_for
from kvpass.lowering.inspect.resources import MainLoop, Resources, resources

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
