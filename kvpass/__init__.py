"""kvpass: prove a Transformer causal, then run it over a cache of rows.

    fast = torch.compile(model, backend="kvpass")

Names are imported when first used, so that ``import kvpass`` costs no more than ``import torch``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpass import errors as errors
    from kvpass.cache import Cache as Cache
    from kvpass.cache import CacheStats as CacheStats
    from kvpass.frontend import compile as compile
    from kvpass.frontend import explain as explain
    from kvpass.frontend import reports as reports
    from kvpass.frontend import wait as wait
    from kvpass.generation import Session as Session
    from kvpass.generation import generate as generate
    from kvpass.generation import open as open
    from kvpass.generation import stream as stream
    from kvpass.report import Report as Report
    from kvpass.runtime import default_cache as default_cache

__version__ = "0.1.0.dev0"

_HOMES = {
    "Cache": "kvpass.cache",
    "CacheStats": "kvpass.cache",
    "Report": "kvpass.report",
    "Session": "kvpass.generation",
    "compile": "kvpass.frontend",
    "default_cache": "kvpass.runtime",
    "explain": "kvpass.frontend",
    "generate": "kvpass.generation",
    "open": "kvpass.generation",
    "reports": "kvpass.frontend",
    "stream": "kvpass.generation",
    "wait": "kvpass.frontend",
}
_MODULES = frozenset({"errors"})

__all__ = [  # noqa: RUF022 (in the order a reader meets them)
    "compile",
    "explain",
    "reports",
    "wait",
    "generate",
    "stream",
    "open",
    "Session",
    "Report",
    "Cache",
    "CacheStats",
    "default_cache",
    "errors",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = import_module(f"kvpass.{name}")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'kvpass' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
