"""Other ways to decode, each in a process of its own, with weights that are written for it from the same model.

A peer's program reads lines of JSON: ids `[B, T]`. More than one row is a prompt that begins anew, one row is the next
token of each sequence. It answers `[seconds, [B tokens]]`; the first line that it writes says what it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kvpass import demos

HERE = Path(__file__).parent


class Peer:
    """One process that decodes.

    Attributes:
        about: what it says of itself: its version, and the seconds it took to be ready.
    """

    def __init__(self, name: str, python: str, *words: object) -> None:
        self.name = name
        command = [python, str(HERE / f"run_{name}.py"), *map(str, words), str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about: dict[str, Any] = self._read()

    def ask(self, ids: list[list[int]]) -> tuple[float, list[int]]:
        """Seconds, and the greedy token of each sequence."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(ids) + "\n")
        self.process.stdin.flush()
        seconds, tokens = self._read()
        return seconds, tokens

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def float_gguf(name: str, path: Path) -> None:
    """The model's own GGUF file with every tensor as float32."""
    import gguf

    with tempfile.TemporaryDirectory() as scratch:
        reader = gguf.GGUFReader(demos.gguf_file(name, Path(scratch)))
        writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
        for key, known in reader.fields.items():
            if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
                continue
            kind = known.types[0]
            sub = known.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, known.contents(), kind, sub_type=sub)
        writer.add_file_type(0)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def first_call(name: str, way: str, ids: list[int], folder: Path) -> dict[str, float]:
    """Seconds of a process that decodes with `way` ("plain" or "kvpass"), whose kernels on disk are in `folder`.

    Returns:
        `load`: from the start of the process to a loaded model; from there, `first`: to the first token, `compiled`: to
        compiled steps (of kvpass).
    """
    words = [sys.executable, str(HERE / "first_call.py"), name, way, json.dumps(ids), str(torch.get_num_threads())]
    began = time.time()
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "KVPASS_CACHE": str(folder)}
    )
    at: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"load": at["loaded"] - began, **{key: at[key] - at["loaded"] for key in ("first", "compiled") if key in at}}
