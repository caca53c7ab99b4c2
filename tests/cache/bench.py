"""How long `begin` and `commit` take: `python -m tests.cache.bench`."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from kvpass.cache import Cache, SlotTable
from tests.cache.support import spec

ROWS, SLOTS, HELD = 1000, 60, 10_000


def main() -> None:
    """Print the median of each kind of call, with few and with many sequences held."""
    print(f"{ROWS} rows of 8 bytes, {SLOTS} slots in one bundle, page size 64; microseconds for begin + commit")
    chance = random.Random(0)
    base = [chance.randrange(50_000) for _ in range(ROWS - 1)]
    for held in (10, HELD):
        cache = Cache("8GiB")
        table = cache.register([spec(f"layer {i}", (1,), (1,)) for i in range(SLOTS)])
        call(cache, table, [base])
        for _ in range(held):  # half of them branch off the same text, half are texts of their own
            cut = chance.choice([0, 300])
            call(cache, table, [base[:cut] + [chance.randrange(50_000) for _ in range(80)]])
        print(f"\n{held} sequences held, {len(cache)} rows")
        kinds: dict[str, tuple[int, Callable[[int], list[list[int]]]]] = {
            "one row more": (400, lambda i: [[*base, i]]),
            "the same again": (400, lambda _: [[*base, 1]]),
            "grow a text row by row": (100, lambda i: [base[:900] + [7] * (i + 1)]),
            "1000 new rows": (100, lambda i: [[10**6 + i, *base]]),
            "branch in a page (copies)": (100, lambda i: [[*base[:970], 10**6 + i]]),
            "batch of 8, one row more": (50, lambda i: [[*base, 10**7 + i, j] for j in range(8)]),
        }
        for name, (times, batch) in kinds.items():
            seconds = [call(cache, table, batch(index)) for index in range(times)]
            print(f"  {name:<28} median {statistics.median(seconds) * 1e6:7.0f}   worst {max(seconds) * 1e6:7.0f}")


def call(cache: Cache, table: SlotTable, batch: list[list[int]]) -> float:
    """Seconds for one call, without making its keys."""
    keys = [b"".join(token.to_bytes(8, "little") for token in tokens) for tokens in batch]
    start = time.perf_counter()
    lease = cache.begin(table, keys, 8, b"", limit=len(batch[0]) - 1)
    for index in range(SLOTS):
        lease.slot(index)
    lease.commit()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
