"""The first tokens of a process: MODEL plain|kvpass IDS THREADS. Writes the times, of the clock, as JSON."""

from __future__ import annotations

import json
import sys
import time

import torch

import kvpass
from kvpass import demos
from kvpass.huggingface import DECODE_KWARGS

name, way, ids, threads = sys.argv[1], sys.argv[2], torch.tensor([json.loads(sys.argv[3])]), int(sys.argv[4])
torch.set_num_threads(threads)
model, _ = demos.load(name)
at = {"loaded": time.time()}
with torch.no_grad():
    if way == "plain":
        model(ids, **DECODE_KWARGS)
        at["first"] = time.time()
    else:
        fast = kvpass.compile(model)
        for end in (-1, None):  # a prompt, then a step
            fast(ids[:, :end], **DECODE_KWARGS)
            at.setdefault("first", time.time())
        kvpass.wait(fast)
        at["compiled"] = time.time()
print(json.dumps(at))
