"""Tiny random models of every architecture that transformers has for text generation."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kvpass.huggingface import import_transformers
from tests.zoo.shrink import (
    CAPS,
    DERIVED,
    ENCODED_BY,
    EQUAL,
    EXCEPTIONS,
    FEATURES,
    GIVEN,
    IDS,
    LAYER_LISTS,
    LAYERS,
    MASKED,
    MAX_LAYERS,
    NUMBERS,
    SPECIAL,
    STARTS,
    VOCAB,
)

Mapped: TypeAlias = Literal["causal", "seq2seq", "speech"]
Attn: TypeAlias = Literal["sdpa", "eager"]

LONGEST = 64
ENCODED = 7
FIRST_TOKEN = 8
NOISE_MATRIX, NOISE_VECTOR = 0.12, 0.1

transformers = import_transformers()

_MAPPINGS: dict[Mapped, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
_TOKEN = re.compile(r"(token_ids?|token_index|unk_index|mask_index)$")
_BASE = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}


def classes(mapping: Mapped) -> dict[str, str]:
    """The names of the model classes of a mapping, by model type."""
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, _MAPPINGS[mapping]))


def has_attn(mapping: Mapped, model_type: str, attn: Attn) -> bool:
    """False where ``attn`` would build the same model as sdpa: its class knows one way only."""
    return attn == "sdpa" or bool(getattr(transformers, classes(mapping)[model_type])._supports_sdpa)


# --- configurations -------------------------------------------------------------------------------------------


def tiny_config(model_type: str) -> Any:
    """The default configuration of a model type, made tiny by the tables of `tests.zoo.shrink`.

    Raises:
        Exception: whatever the configuration raises on sizes that do not fit each other.
    """
    kind = transformers.CONFIG_MAPPING[model_type]
    return _shrunk(kind(**STARTS.get(model_type, {})), {})


def _shrunk(config: Any, special: dict[int, int], place: str = "") -> Any:
    """``special``: the small token ids that stand for the large ones met so far; ``place``: the field it stands in."""
    kind = type(config)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in _BASE or "_token" in field.name]
    config.allow_global_per_layer_attribute_access = True
    fields = {name: getattr(config, name, None) for name in names if name not in DERIVED}
    kept = _kept_layers(fields)
    tiny: dict[str, Any] = {}
    for name, value in fields.items():
        inner = isinstance(value, transformers.PreTrainedConfig)
        tiny[name] = (
            _shrunk(value, special, f"{kind.model_type}.{name}") if inner else _tiny(name, value, fields, kept, special)
        )
    asked = tiny | EXCEPTIONS.get(kind.model_type, {}) | EXCEPTIONS.get(place, {})
    return kind(**{name: value for name, value in asked.items() if value is not ...})


def _kept_layers(fields: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The number of layers, and which of them to keep: the first of each kind, two at least."""
    count: int = next((fields[name] for name in LAYERS if isinstance(fields.get(name), int)), 0)
    count = count or max(len(fields.get(name) or ()) for name in LAYER_LISTS)
    lists = [value for value in fields.values() if _per_layer(value, count)]
    if not lists:
        return count, []
    seen: list[set[str]] = [set() for _ in lists]
    kept: list[int] = []
    for layer in range(count):
        kinds = [str(values[layer]) for values in lists]
        if any(kind not in known for kind, known in zip(kinds, seen, strict=True)) and len(kept) < MAX_LAYERS:
            kept.append(layer)
            for kind, known in zip(kinds, seen, strict=True):
                known.add(kind)
    return count, kept if len(kept) > 1 else list(range(min(2, count)))


def _per_layer(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count > 1


def _tiny(
    name: str, value: Any, fields: Mapping[str, Any], kept: tuple[int, list[int]], special: dict[int, int]
) -> Any:
    count, layers = kept
    if value is None:
        return GIVEN.get(name)
    if _TOKEN.search(name):
        return _token(value, special)
    if name in LAYERS and layers and value == count:
        return len(layers)
    if _per_layer(value, count):
        return [_capped(name, value[layer]) for layer in layers]
    if name in EQUAL and value == fields.get(EQUAL[name]):
        return _capped(EQUAL[name], value)
    return _capped(name, value)


def _token(value: Any, special: dict[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_token(entry, special) for entry in value]
    if not isinstance(value, int) or value < FIRST_TOKEN:
        return value
    return special.setdefault(value, SPECIAL + len(special) % (VOCAB - SPECIAL))


def _capped(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_capped(name, entry) for entry in value]
    cap = VOCAB if name.endswith("vocab_size") else CAPS.get(name)
    return value if cap is None or not isinstance(value, int) or isinstance(value, bool) else min(value, cap)


# --- models ---------------------------------------------------------------------------------------------------


def tiny_model(mapping: Mapped, model_type: str, attn: Attn, seed: int = 0) -> nn.Module:
    """A random float32 model in eval mode, no parameter of which is zero, one, or otherwise without effect.

    Raises:
        Exception: whatever transformers raises where it cannot build the model.
    """
    kind = getattr(transformers, classes(mapping)[model_type])
    config = _of_class(tiny_config(model_type), kind)
    chosen = attn if attn == "eager" else None  # None is sdpa where a part of the model knows it, else eager
    if mapping == "causal":
        for name, value in (("is_decoder", True), ("causal", True)):
            if hasattr(config, name):
                setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = kind._from_config(config, attn_implementation=chosen, dtype=torch.float32)
        jitter(model)
    return model.eval()


def _of_class(config: Any, kind: Any) -> Any:
    """The configuration, or the part of it that the class takes."""
    parts = [part for part in vars(config).values() if isinstance(part, kind.config_class)]
    return config if isinstance(config, kind.config_class) or not parts else parts[0]


@torch.no_grad()
def jitter(model: nn.Module) -> None:
    """Noise on all that is learned: parameters, and what a checkpoint holds besides if it is a vector or a number.

    Tables among the buffers are computed, not learned: masks, decays.
    """
    held = {id(t): t for t in (*model.parameters(), *model.state_dict(keep_vars=True).values())}
    for tensor in held.values():
        if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or tensor.dim() < 2):
            tensor.add_(torch.randn_like(tensor), alpha=NOISE_MATRIX if tensor.dim() > 1 else NOISE_VECTOR)


# --- inputs ---------------------------------------------------------------------------------------------------


def inputs(model: nn.Module, rows: int, batch: int, seed: int = 0, hears: int = 0) -> dict[str, Any]:
    """The arguments of a call; fewer rows of the same seed are a prefix of more rows.

    Args:
        hears: another number is another encoder input.

    Returns:
        ``input_ids [batch, rows]`` for a decoder. For an encoder and a decoder what the encoder reads or hears, of one
        length, and ``decoder_input_ids [batch, rows]``.
    """
    held: Any = model
    kind, known = held.config.model_type, inspect.signature(model.forward).parameters
    texts, inner = IDS.get(kind, (1, ()))
    ids = _ids((batch * texts, LONGEST, *inner), seed)[:, :rows].clone()
    call: dict[str, Any] = {"use_cache": False} if "use_cache" in known or "kwargs" in known else {}
    if "decoder_input_ids" not in known:
        sounds = _heard(kind, "input_features", rows, batch, hears) if "input_features" in known else {}
        return {"input_ids": ids} | sounds | NUMBERS.get(kind, {}) | call
    name = "input_values" if "input_values" in known else "input_features"
    read = ENCODED_BY.get(kind, ENCODED)
    encoded = {"input_ids": _ids((batch, read), seed + hears + 1)}
    if "attention_mask" in known:
        encoded["attention_mask"] = torch.ones(batch, read, dtype=torch.long)
        encoded["attention_mask"][1::2, -2:] = 0  # the second text of two is shorter
    if held.main_input_name != "input_ids":
        encoded = _heard(kind, name, rows, batch, hears) or encoded
    masked = {"decoder_attention_mask": torch.ones_like(ids)} if kind in MASKED else {}
    return encoded | {"decoder_input_ids": ids} | masked | call


def _heard(kind: str, name: str, rows: int, batch: int, seed: int) -> dict[str, Tensor]:
    """What the encoder of a model type hears, by the name of its argument; empty where it reads, or need not hear."""
    if kind not in FEATURES:
        return {}
    shape = [size if size > 0 else -size * LONGEST for size in FEATURES[kind]]
    full = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
    for axis, size in enumerate(FEATURES[kind], 1):
        full = full if size > 0 else full.narrow(axis, 0, -size * rows).clone()
    return {name: full}


def _ids(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(FIRST_TOKEN, SPECIAL, shape, generator=torch.Generator().manual_seed(seed))
