"""The loop of a peer's program; nothing but the standard library, since it runs in any environment."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(
    about: dict[str, Any], prompt: Callable[[list[list[int]]], list[int]], step: Callable[[list[int]], list[int]]
) -> None:
    """Answer the lines of standard input: `prompt` takes ids [B, T] and begins anew, `step` takes B tokens.

    Both give the greedy tokens that follow, one for each sequence.
    """
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        ids = json.loads(line)
        start = time.perf_counter()
        tokens = prompt(ids) if len(ids[0]) > 1 else step([row[0] for row in ids])
        print(json.dumps([time.perf_counter() - start, tokens]), flush=True)
