"""The transfer rules, by family. Importing this package fills `kvpass.analysis.table.RULES`."""

from kvpass.analysis.rules import (
    attention,
    contraction,
    factories,
    gathers,
    joins,
    layout,
    pointwise,
    reductions,
    windows,
)

__all__ = ["attention", "contraction", "factories", "gathers", "joins", "layout", "pointwise", "reductions", "windows"]
