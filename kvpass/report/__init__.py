"""What kvpass found out, told to people (`str`), to programs (`to_dict`) and as pictures (`kvpass dump`)."""

from __future__ import annotations

from kvpass.report.report import Report

__all__ = ["Report"]
