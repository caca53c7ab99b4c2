"""Models compiled by kvpass for a history of calls."""

import kvpass
from tests.models import Transformer
from tests.property.oracle import Model


def compiled(model: Transformer, capacity: str = "64MiB") -> tuple[Model, kvpass.Cache]:
    """Small pages, so that a text has several, filled with NaN, so that a row read before it is written shows."""
    cache = kvpass.Cache(capacity=capacity, page_size=4, poison=True)
    return kvpass.compile(model, cache=cache, tiers="compiled"), cache


def unverified(model: Transformer) -> tuple[Model, kvpass.Cache]:
    """Without the check at compile time, which would see a fault before a history does."""
    cache = kvpass.Cache(capacity="64MiB", page_size=4, poison=True)
    return kvpass.compile(model, cache=cache, verify=False, tiers="compiled"), cache


def few_pages(model: Transformer) -> tuple[Model, kvpass.Cache]:
    """Room for about two texts of full length."""
    config = model.config
    row = 2 * config.layers * config.kv_heads * config.head_size * config.torch_dtype.itemsize
    return compiled(model, f"{row * 100}B")
