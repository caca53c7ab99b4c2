"""llama.cpp on a GGUF file: FILE ROWS BATCH THREADS. Its keys and values are float16, as it chooses by itself."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as llama
import numpy as np
from serving import serve

AT_ONCE = 512  # tokens of a prompt
ERROR = 4  # of ggml's levels of messages

path, rows, sequences, threads = sys.argv[1], *map(int, sys.argv[2:5])


@llama.llama_log_callback
def errors_only(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


llama.llama_log_set(errors_only, ctypes.c_void_p())
llama.llama_backend_init()
model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
params = llama.llama_context_default_params()
params.n_ctx, params.n_seq_max = rows * sequences, sequences
params.n_batch = params.n_ubatch = AT_ONCE
params.n_threads = params.n_threads_batch = threads
context = llama.llama_init_from_model(model, params)
if not context:
    sys.exit(f"llama.cpp could not open {path}")
vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
batch = llama.llama_batch_init(AT_ONCE, 0, 1)
length = 0


def decode(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
    """Tokens as (token, position, sequence, whether its logits are wanted); the greedy tokens of those."""
    for at, (token, position, sequence, wanted) in enumerate(tokens):
        batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
    batch.n_tokens = len(tokens)
    if llama.llama_decode(context, batch):
        sys.exit("llama.cpp could not decode")
    logits = (llama.llama_get_logits_ith(context, at) for at, token in enumerate(tokens) if token[3])
    return [int(np.ctypeslib.as_array(row, (vocabulary,)).argmax()) for row in logits]


def prompt(ids: list[list[int]]) -> list[int]:
    global length
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    length, found = len(ids[0]), []
    for sequence, row in enumerate(ids):
        wanted = [(token, at, sequence, at == length - 1) for at, token in enumerate(row)]
        for begin in range(0, length, AT_ONCE):
            found += decode(wanted[begin : begin + AT_ONCE])
    return found


def step(tokens: list[int]) -> list[int]:
    global length
    length += 1
    return decode([(token, length - 1, sequence, True) for sequence, token in enumerate(tokens)])


serve({"version": f"llama-cpp-python {llama.__version__}"}, prompt, step)
