"""Hugging Face models from a local folder, never from the network."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest import mock

import torch

from kvpass.errors import InputError
from kvpass.weights import file_digest, kept_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]

# What a decode step asks a Hugging Face model for: none of its own caches, and logits [B, 1, V] of the last row.
DECODE_KWARGS: dict[str, object] = {"use_cache": False, "logits_to_keep": 1}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_folder(folder: str | Path) -> Loaded:
    """The causal language model in ``folder``, float32 and in eval mode, and its tokenizer if it has one.

    Args:
        folder: holds ``config.json`` and safetensors, or exactly one ``.gguf`` file.

    Raises:
        InputError: the folder is missing, holds no model, or holds one that transformers cannot read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    if (folder / "config.json").is_file():
        return _read(folder)
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise InputError(f"{folder} holds no model: neither a config.json nor a .gguf file")
    if len(found) > 1:
        raise InputError(f"{folder} holds {len(found)} .gguf files; give a folder with one of them")
    return load_gguf(found[0].stem, file_digest(found[0]), lambda _scratch: found[0])


def load_gguf(name: str, digest: str, locate: Callable[[Path], Path]) -> Loaded:
    """The model and tokenizer of a GGUF file, dequantised to float32 once and then kept as safetensors.

    The first time takes half a minute for SmolLM2-135M on two cores (3 s are dequantisation, the rest is the
    vocabulary, parsed token by token); afterwards it takes one second.

    Args:
        name: a word for the kept folder.
        digest: of the GGUF file's content.
        locate: returns the path of the GGUF file, which it may put into the scratch folder that it is given; called
            only when nothing is kept yet.

    Raises:
        InputError: transformers, gguf or accelerate is missing, or the file is no causal language model.
    """
    transformers = import_transformers()
    _require_gguf()
    key = f"1 {digest} transformers {transformers.__version__} gguf {version('gguf')}"
    return _read(kept_folder(name, key, functools.partial(_convert, locate)))


def import_transformers() -> Any:
    """transformers, offline and without progress bars and notices.

    Raises:
        InputError: transformers is not installed.
    """
    # Both are read once, when transformers is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'kvpass[demo]'") from error
    quiet: Any = logging  # untyped
    quiet.disable_progress_bar()
    quiet.set_verbosity_error()
    return transformers


def _require_gguf() -> None:
    """transformers reads a GGUF file only with gguf, and only with accelerate."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(f"a GGUF file cannot be read without {error.name}: pip install 'kvpass[demo]'") from error


def _read(folder: Path) -> Loaded:
    transformers = import_transformers()
    with _as_input_error(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        named = any((folder / name).is_file() for name in _TOKENIZER_FILES)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True) if named else None
    return model.eval(), tokenizer


def _convert(locate: Callable[[Path], Path], folder: Path) -> None:
    """Write the GGUF file that ``locate`` finds into ``folder`` as a plain Hugging Face model."""
    transformers = import_transformers()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf-") as scratch:
        path = locate(Path(scratch))
        source: dict[str, object] = {"gguf_file": path.name, "local_files_only": True}
        with _as_input_error(path), _parsed_once():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
            model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
    # The weights are plain float32 by now; with these two left, transformers refuses to save them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers share one reader of a GGUF file; it makes three, of 10 s each for a vocabulary of 49,152."""
    import gguf

    once = functools.lru_cache(maxsize=1)(gguf.GGUFReader)
    with mock.patch.object(gguf, "GGUFReader", once):
        yield


@contextlib.contextmanager
def _as_input_error(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # a damaged file makes transformers raise anything, struct.error for one
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"transformers cannot read {path} as a causal language model: {reason}") from error
