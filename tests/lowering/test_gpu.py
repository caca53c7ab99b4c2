"""What a graph on a GPU calls, by Triton's interpreter: in a process of its own, which has no other Triton."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from dataclasses import replace
import torch, triton.testing
from kvpass.ir import Layout
from kvpass.lowering import gpu, tune
from kvpass.lowering.triton_config import config
from tests.lowering.cases import POOL, Inputs, Shape, assert_as_good_as_plain, attention

inside = Layout(before=0, outside=False, factor=32)
for mask, new, cached, page_size in (("window", 1, 70, 16), ("padding", 3, 40, 16), ("causal", 40, 17, 32)):
    spec = attention(4, 2, 32, mask=mask)
    inputs = Inputs(spec, Shape(new=new, cached=cached, page_size=page_size))
    (keys, key_table), (values, value_table) = inputs.pages(inputs.key), inputs.pages(inputs.value)
    rows = inputs.shape.rows
    by_head = gpu.lower(spec, POOL, POOL, "sm_90")
    found = by_head(inputs.query, (keys, key_table, -1), (values, value_table, -1), cached, rows, inputs.reads)
    assert_as_good_as_plain(found, inputs)
    by_row = gpu.lower(spec, inside, POOL, "sm_90")
    turned = keys.permute(1, 2, 0, 3).contiguous()
    found = by_row(inputs.query, (turned, key_table, -1), (values, value_table, -1), cached, rows, inputs.reads)
    assert_as_good_as_plain(found, inputs)
    assert found.transpose(1, 2).is_contiguous()
    of_tables = gpu.lower(spec, None, None, "sm_90")
    found = of_tables(inputs.query, (inputs.key,), (inputs.value,), cached, rows, inputs.reads)
    assert_as_good_as_plain(found, inputs)
    # Heads that stand before the pages with something else between them.
    apart = torch.full((3, 2, 2, *keys.shape[1:]), float("nan"))
    apart[1, :, 0] = keys
    mixed = gpu.lower(spec, Layout(before=3, outside=True, factor=2), None, "sm_90")
    found = mixed(inputs.query, (apart[1:], key_table, -1), (inputs.value,), cached, rows, inputs.reads)
    assert_as_good_as_plain(found, inputs)

tuned = []
triton.testing.do_bench = lambda run, return_mode: tuned.append(run()) or -len(tuned)
torch.cuda.get_device_name = lambda device: "a device"
tune.candidates = lambda spec, arch: [config(spec, arch), replace(config(spec, arch), block_n=16)]
inputs = Inputs(attention(4, 2, 32), Shape(new=1, cached=70, page_size=16))
(keys, key_table), (values, value_table) = inputs.pages(inputs.key), inputs.pages(inputs.value)
call = inputs.query, (keys, key_table, -1), (values, value_table, -1), 70, 71, []
for _ in range(2):
    kernel = gpu.lower(inputs.spec, POOL, POOL, "sm_90", autotune=True)
    assert_as_good_as_plain(kernel(*call), inputs)
    assert_as_good_as_plain(kernel(*call), inputs)
assert len(tuned) == 2, len(tuned)  # the second kernel finds the winner on the disk
print("same")
"""


def test_a_graph_on_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "KVPASS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "same\n", done.stderr[-3000:]
