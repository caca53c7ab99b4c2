"""Random models: from a `random.Random` for plain loops, and as a hypothesis strategy that shrinks."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import strategies as st

from tests.models.attention import SCORED, SCORED_PADDABLE
from tests.models.config import INPUTS, MASK_SOURCES, MASKS, MLPS, NORMS, OUTPUTS, POSITIONS, Config
from tests.spellings import CAUSAL_ONLY, PADDABLE, SPELLINGS

T = TypeVar("T")

# (query heads, key heads): one head, MHA, GQA, MQA
HEADS = ((1, 1), (2, 2), (3, 3), (4, 2), (6, 2), (3, 1), (4, 1))
HEAD_SIZES = (8, 4, 6, 10, 12, 16, 5)

# The choices of one model, the simplest first, since that is the direction in which hypothesis shrinks.
CHOICES: dict[str, Sequence[Any]] = {
    "spelling": tuple(SPELLINGS),
    "position": POSITIONS,
    "mask": MASKS,
    "mask_from": ("arange", *(m for m in MASK_SOURCES if m != "arange")),
    "width": (4, 1, 2, 3, 7, 16),
    "alternate": (False, False, True),
    "layers": (1, 2, 1, 2, 3),
    "heads": HEADS,
    "head_size": HEAD_SIZES,
    "norm": NORMS,
    "prenorm": (True, True, False),
    "parallel": (False, False, False, True),
    "mlp": MLPS,
    "bias": (False, True),
    "fused_qkv": (False, True),
    "merged_rows": (False, False, True),
    "qk_norm": (False, False, False, True),
    "soft_cap": (None, None, None, None, 5.0),
    "tied": (False, False, True),
    "output": OUTPUTS,
    "inputs": ("ids", "ids", "ids", *INPUTS),
    "dtype": ("float32", "float32", "float32", "float64", "bfloat16"),
}


def make_config(choose: Callable[[Sequence[T]], T], seed: int, **fixed: Any) -> Config:
    """A valid `Config`: each field by `choose` unless it is in `fixed`, then made consistent."""
    drawn: dict[str, Any] = {name: choose(choices) for name, choices in CHOICES.items()}
    drawn["heads"], drawn["kv_heads"] = drawn["heads"]
    return consistent(Config(**{**drawn, "seed": seed, **fixed}), seed)


def consistent(config: Config, pick: int = 0) -> Config:
    """The nearest `Config` whose parts go together. `pick` chooses where a spelling has to be replaced."""
    c = config
    if c.mlp == "none":
        c = replace(c, parallel=False, prenorm=True)
    if c.parallel:
        c = replace(c, prenorm=True)
    if c.position.startswith("rotary") and c.head_size % 2:
        c = replace(c, head_size=c.head_size + 1)
    if c.inputs == "positions" and c.position not in (
        "learned",
        "sinusoid_computed",
        "rotary_half",
        "rotary_interleaved",
    ):
        c = replace(c, inputs="ids")
    if c.inputs == "padding" and c.mask_from == "argument":
        c = replace(c, mask_from="arange")
    if c.mask == "causal":
        c = replace(c, alternate=False, width=Config.width)
    if c.dtype == "float64" and (c.norm == "rms_by_hand" or c.spelling in ("softmax_fp32", "exp_in_fp32")):
        c = replace(c, dtype="float32")
    return _with_spelling(c, pick)


def _with_spelling(c: Config, pick: int) -> Config:
    if c.scored:
        names = sorted(SCORED_PADDABLE if c.inputs == "padding" else SCORED)
    elif c.inputs == "padding":
        names = sorted(PADDABLE)
    elif c.mask != "causal":
        names = [name for name in SPELLINGS if name not in CAUSAL_ONLY]
    else:
        names = list(SPELLINGS)
    return c if c.spelling in names else replace(c, spelling=names[pick % len(names)])


def random_config(seed: int, **fixed: Any) -> Config:
    """The model number `seed`."""
    return make_config(random.Random(seed).choice, seed, **fixed)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> Config:
    """Models for hypothesis."""
    return make_config(lambda choices: draw(st.sampled_from(choices)), draw(st.integers(0, 999)), **fixed)
