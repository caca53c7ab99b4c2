"""From the user's model to a compiled program: capture, backend entry, explain."""

from kvpass.frontend.api import compile, explain, reports, wait

__all__ = ["compile", "explain", "reports", "wait"]
