"""OpenVINO on the folder of a Hugging Face model: FOLDER ROWS BATCH THREADS. All of it in float32."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import openvino
from optimum.exporters.openvino import main_export
from serving import serve

AT_ONCE = 512  # rows of a prompt

folder, _, sequences, threads = sys.argv[1], *map(int, sys.argv[2:5])
begin = time.perf_counter()
with tempfile.TemporaryDirectory() as made:
    with contextlib.redirect_stdout(sys.stderr):
        main_export(folder, made, task="text-generation-with-past", convert_tokenizer=False)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(Path(made) / "openvino_model.xml", "CPU", options)
    request = compiled.create_infer_request()
    ready = time.perf_counter() - begin
names = {name for port in request.model_inputs for name in port.get_names()}
length = 0


def run(ids: np.ndarray) -> list[int]:
    """Ids [B, N] behind what is there."""
    global length
    batch, new = ids.shape
    length += new
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.broadcast_to(np.arange(length - new, length), (batch, new)),
        "beam_idx": np.arange(batch, dtype=np.int32),
    }
    request.infer({name: inputs[name] for name in names})
    return [int(row[-1].argmax()) for row in request.get_output_tensor(0).data]


def prompt(ids: list[list[int]]) -> list[int]:
    global length
    request.reset_state()
    length, tokens = 0, list[int]()
    for begin in range(0, len(ids[0]), AT_ONCE):  # logits come out for every row
        tokens = run(np.array(ids)[:, begin : begin + AT_ONCE])
    return tokens


serve(
    {"version": f"OpenVINO {importlib.metadata.version('openvino')}", "ready_s": ready},
    prompt,
    lambda tokens: run(np.array(tokens)[:, None]),
)
