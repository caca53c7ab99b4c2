"""Ops that stand for a whole layer or cell, in the ops that they are made of.

`aten._transformer_encoder_layer_fwd` is what a Transformer layer of PyTorch runs in evaluation. Its mask is true where
a key is hidden; one that is not boolean is made so, and a row without keys is NaN.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from kvpass.transforms.spell import call, named, replace, sizes

aten = torch.ops.aten
Make = Callable[..., fx.Node]


def decomposed(graph: fx.Graph) -> None:
    """Rewrite every such op of a graph."""
    for node in list(graph.nodes):
        if node.target in (aten.meshgrid.default, aten.meshgrid.indexing):
            _meshgrid(graph, node)
        made_of = _MADE_OF.get(node.target)
        if made_of is not None:
            with graph.inserting_before(node):
                made = made_of(partial(call, graph, node), named(node))
            replace(node, made)


def _meshgrid(graph: fx.Graph, node: fx.Node) -> None:
    """Vectors, each along an axis of its own and expanded to all others; ``xy`` swaps the first two of the axes."""
    given = named(node)
    vectors, axes = given["tensors"], list(range(len(given["tensors"])))
    if given.get("indexing") == "xy" and len(axes) > 1:
        axes[:2] = 1, 0
    if any(user.target is not operator.getitem for user in node.users):
        return
    with graph.inserting_before(node):
        make = partial(call, graph, node)
        shape = [size for vector in vectors for size in sizes(make, vector) or [1]]
        shape = [shape[axis] for axis in axes]
        made = []
        for vector, axis in zip(vectors, axes, strict=True):
            alone = [size if k == axis else 1 for k, size in enumerate(shape)]
            made.append(make(aten.expand.default, make(aten.reshape.default, vector, alone), shape))
    for user in list(node.users):
        replace(user, made[int(user.args[1])])  # type: ignore[arg-type]
    graph.erase_node(node)


def _gru_cell(make: Make, given: dict[str, Any]) -> fx.Node:
    """``(1 - z) * n + z * h`` (the formulas of `torch.nn.GRUCell`)."""
    x = make(aten.linear.default, given["input"], given["w_ih"], given["b_ih"])
    h = make(aten.linear.default, given["hx"], given["w_hh"], given["b_hh"])
    size = given["hx"].meta["val"].shape[-1]

    def part(y: fx.Node, k: int) -> fx.Node:
        return make(aten.slice.Tensor, y, y.meta["val"].dim() - 1, k * size, (k + 1) * size)

    reset, keep = (make(aten.sigmoid.default, make(aten.add.Tensor, part(x, k), part(h, k))) for k in (0, 1))
    new = make(aten.tanh.default, make(aten.add.Tensor, part(x, 2), make(aten.mul.Tensor, reset, part(h, 2))))
    change = make(aten.mul.Tensor, keep, make(aten.sub.Tensor, given["hx"], new))
    return make(aten.add.Tensor, new, change)


def _layer(make: Make, given: dict[str, Any]) -> fx.Node:
    """Attention and a network of two layers, normalised before (``norm_first``) or after."""

    def norm(x: fx.Node, k: int) -> fx.Node:
        weight, bias = given[f"norm_weight_{k}"], given[f"norm_bias_{k}"]
        return make(aten.layer_norm.default, x, [given["embed_dim"]], weight, bias, given["eps"])

    def network(x: fx.Node) -> fx.Node:
        x = make(aten.linear.default, x, given["ffn_weight_1"], given["ffn_bias_1"])
        x = make(aten.gelu.default if given["use_gelu"] else aten.relu.default, x)
        return make(aten.linear.default, x, given["ffn_weight_2"], given["ffn_bias_2"])

    x = given["src"]
    if given["norm_first"]:
        x = make(aten.add.Tensor, x, _attention(make, norm(x, 1), given))
        return make(aten.add.Tensor, x, network(norm(x, 2)))
    x = norm(make(aten.add.Tensor, x, _attention(make, x, given)), 1)
    return norm(make(aten.add.Tensor, x, network(x)), 2)


def _attention(make: Make, x: fx.Node, given: dict[str, Any]) -> fx.Node:
    """Self-attention of ``[B, S, D]``, from one product for queries, keys and values."""
    size, heads = given["embed_dim"], given["num_heads"]
    lead = sizes(make, x)[:2]
    joined = make(aten.linear.default, x, given["qkv_weight"], given["qkv_bias"])
    sides = []
    for k in range(3):
        side = make(aten.slice.Tensor, joined, 2, k * size, (k + 1) * size)
        sides.append(make(aten.transpose.int, make(aten.reshape.default, side, [*lead, heads, size // heads]), 1, 2))
    query, key, value = sides
    query = make(aten.mul.Tensor, query, (size // heads) ** -0.5)
    scores = make(aten.matmul.default, query, make(aten.transpose.int, key, 2, 3))
    if given["mask"] is not None:
        scores = make(aten.masked_fill.Scalar, scores, _hidden(make, given), float("-inf"))
    mixed = make(aten.matmul.default, make(aten.softmax.int, scores, -1), value)
    rows = make(aten.reshape.default, make(aten.transpose.int, mixed, 1, 2), [*lead, size])
    return make(aten.linear.default, rows, given["proj_weight"], given["proj_bias"])


def _hidden(make: Make, given: dict[str, Any]) -> fx.Node:
    """The mask: ``[S, S]``, of keys ``[B, S]`` (type 1), or ``[B, H, S, S]``."""
    mask: fx.Node = given["mask"]
    if mask.meta["val"].dtype is not torch.bool:
        mask = make(aten._to_copy.default, mask, dtype=torch.bool)
    if given["mask_type"] == 1:
        mask = make(aten.unsqueeze.default, make(aten.unsqueeze.default, mask, 1), 1)
    return mask


_MADE_OF: dict[Any, Callable[[Make, dict[str, Any]], fx.Node]] = {
    aten._transformer_encoder_layer_fwd.default: _layer,
    aten.gru_cell.default: _gru_cell,
}
