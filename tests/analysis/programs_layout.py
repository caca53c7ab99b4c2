"""Programs that move entries, look them up, or contract them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.analysis.programs import INF, Case

aten = torch.ops.aten
sdpa = F.scaled_dot_product_attention


def written(x: Tensor, rows: int | slice, value: Tensor | float) -> Tensor:
    """``x[:, rows] = value``."""
    x = x.clone()
    x[:, rows] = value
    return x


LAYOUT: dict[str, Case] = {
    "view_heads": Case(lambda e: e.x.view(*e.x.shape[:2], 2, 2), "row"),
    "view_heads_merged": Case(lambda e: e.heads.transpose(1, 2).reshape(e.x.shape), "row"),
    "view_rows_and_batch": Case(lambda e: e.x.reshape(-1, 4) @ e.weight.t(), "row"),
    "view_rows_back": Case(lambda e: (e.x.reshape(-1, 4) * 2).view(e.x.shape), "row"),
    "view_wrong_way": Case(lambda e: e.heads.reshape(e.x.shape), "refused"),
    "view_splits_rows": Case(lambda e: e.x[:, : e.S // 2 * 2].reshape(e.x.shape[0], -1, 2, 4), "refused"),
    "unsafe_view": Case(lambda e: aten._unsafe_view.default(e.x, [*e.x.shape[:2], 2, 2]), "row"),
    "flatten": Case(lambda e: aten.flatten.using_ints(e.x, 0, 1) * 1.5, "row"),
    "transpose": Case(lambda e: e.x.transpose(1, 2), "row"),
    "t": Case(lambda e: aten.t.default(e.weight) @ e.weight, "index"),
    "mT": Case(lambda e: aten.mT.default(e.x), "row"),
    "numpy_T": Case(lambda e: aten.numpy_T.default(e.weight) * 2, "index"),
    "permute": Case(lambda e: e.heads.permute(0, 2, 3, 1), "row"),
    "movedim": Case(lambda e: aten.movedim.int(e.x, 1, 0), "row"),
    "movedim_list": Case(lambda e: aten.movedim.intlist(e.heads, [1, 3], [0, 1]), "row"),
    "unsqueeze": Case(lambda e: e.x.unsqueeze(1), "row"),
    "squeeze": Case(lambda e: aten.squeeze.dim(e.x[:, :, :1], 2), "row"),
    "squeeze_dims": Case(lambda e: aten.squeeze.dims(e.x[:, :, :1], [1, 2]), "row"),
    "squeeze_all": Case(lambda e: aten.squeeze.default(e.x[:, :, :1]), "row"),
    "expand_heads": Case(lambda e: e.x[:, :, None].expand(-1, -1, 5, -1), "row"),
    "expand_positions": Case(lambda e: e.i.expand(e.x.shape[0], -1), "index"),
    "broadcast_to": Case(lambda e: aten.broadcast_to.default(e.bias, e.x.shape), "index"),
    "broadcast_tensors": Case(lambda e: torch.mul(*aten.broadcast_tensors.default([e.bias, e.x])), "row"),
    "written_over": Case(lambda e: aten.fill.Scalar(torch.empty_like(e.x), 1.5) * e.x, "row"),
    "fill": Case(lambda e: aten.fill.Scalar(e.x, 1.5) * e.x, "row"),
    "repeat": Case(lambda e: e.x.repeat(1, 1, 2), "row"),
    "repeat_rows": Case(lambda e: e.x.repeat(1, 2, 1), "row"),
    "tile": Case(lambda e: aten.tile.default(e.x, [1, 1, 2]), "row"),
    "tile_last": Case(lambda e: aten.tile.default(e.x, [2]), "row"),
    "repeat_for_each_sequence": Case(lambda e: e.style.repeat(e.x.shape[0], 1, 1), "index"),
    "repeat_for_each_row": Case(lambda e: e.style[:1].repeat(e.S, 1) + e.x, "row"),
    "repeat_first_row": Case(lambda e: e.x[:, :1].repeat(1, e.S, 1), "row"),
    "repeat_last_row": Case(lambda e: e.x[:, -1:].repeat(1, e.S, 1), "row"),
    "repeat_interleave": Case(lambda e: e.heads.repeat_interleave(2, 1), "row"),
    "repeat_interleave_rows": Case(lambda e: e.x.repeat_interleave(2, 1), "refused"),
    "repeat_interleave_flat": Case(lambda e: e.x[:, :, :1] + e.bias.repeat_interleave(2), "row"),
    "repeat_kv": Case(lambda e: e.heads[:, :, None].expand(-1, -1, 5, -1, -1).flatten(1, 2), "row"),
    # cutting
    "slice_features": Case(lambda e: e.x[..., 1:3], "row"),
    "slice_prefix": Case(lambda e: e.x[:, :3], "row"),
    "slice_all_but_last": Case(lambda e: e.x[:, :-1], "row"),
    "slice_tail": Case(lambda e: e.x[:, -2:], "row"),
    "slice_from": Case(lambda e: e.x[:, 1:], "row"),
    "slice_middle": Case(lambda e: e.x[:, 1:4], "row"),
    "slice_next_and_own": Case(lambda e: e.x[:, 1:] + e.x[:, :-1], "row"),
    "slice_step": Case(lambda e: e.x[:, ::2], "refused"),
    "slice_table": Case(lambda e: e.table[: e.S] + e.x, "row"),
    "slice_table_from": Case(lambda e: e.table[2 : e.S + 2] + e.x, "row"),
    "slice_table_from_the_end": Case(lambda e: e.table[11 - e.S :] + e.x, "length"),
    "slice_batch": Case(lambda e: e.x[1:], "batch"),
    "select_last": Case(lambda e: e.x[:, -1], "row"),
    "select_first": Case(lambda e: e.x[:, 0], "row"),
    "select_first_beside": Case(lambda e: e.x + e.x[:, :1], "pair"),
    "select_last_beside": Case(lambda e: e.x + e.x[:, -1:], "pair"),
    "select_feature": Case(lambda e: e.x[..., 2], "row"),
    "select_batch": Case(lambda e: e.x[0], "batch"),
    "split": Case(lambda e: e.x.split(2, -1)[1] * e.x.chunk(2, -1)[0], "row"),
    "unbind": Case(lambda e: e.x.unbind(-1)[3], "row"),
    # joining
    "cat_features": Case(lambda e: torch.cat([e.x, e.y], -1), "row"),
    "cat_of_masked": Case(lambda e: torch.cat([e.weights, 2 * e.weights * e.band], 0)[: len(e.x)] @ e.y, "batch"),
    "cat_heads_of_masked": Case(
        lambda e: torch.cat([e.weights[:, None], 2 * (e.weights * e.band)[:, None]], 1) @ e.y[:, None], "row"
    ),
    "stack_of_masked": Case(lambda e: torch.stack([e.finite, e.finite * 2], 1).softmax(-1) @ e.y[:, None], "row"),
    "cat_of_masked_and_not": Case(
        lambda e: torch.cat([e.weights[:, None], e.scores[:, None]], 1) @ e.y[:, None], "whole"
    ),
    "cat_of_low_and_masked": Case(
        lambda e: torch.cat([e.finite[:, None], e.masked[:, None]], 1).softmax(-1) @ e.y[:, None], "row"
    ),
    "cat_of_low_and_zero": Case(
        lambda e: torch.cat([e.finite[:, None], e.weights[:, None]], 1).softmax(-1) @ e.y[:, None], "whole"
    ),
    "concat": Case(lambda e: aten.concat.default([e.x, e.y], 2), "row"),
    "cat_rotate_half": Case(lambda e: torch.cat([-e.x[..., 2:], e.x[..., :2]], -1), "row"),
    "cat_before": Case(lambda e: torch.cat([e.bias.expand(e.x.shape[0], 1, 4), e.x[:, :-1]], 1), "row"),
    "cat_after": Case(lambda e: torch.cat([e.x[:, 1:], e.bias.expand(e.x.shape[0], 1, 4)], 1), "row"),
    "cat_replaces_the_last": Case(
        lambda e: torch.cat([e.x[:, :-2], e.table[:2].expand(e.x.shape[0], 2, 4)], 1), "length"
    ),
    "cat_replaces_the_first": Case(lambda e: torch.cat([e.table[:2].expand(e.x.shape[0], 2, 4), e.x[:, 2:]], 1), "row"),
    "cat_rows_swapped": Case(lambda e: torch.cat([e.x[:, 1:2], e.x[:, :1], e.x[:, 2:]], 1), "row"),
    "cat_positions": Case(lambda e: torch.cat([e.i[:2] * 0, e.i[:-2]]), "index"),
    "stack_new": Case(lambda e: torch.stack([e.x, e.y], 2), "row"),
    "stack_interleave": Case(lambda e: torch.stack([-e.x[..., 1::2], e.x[..., ::2]], -1).flatten(-2), "row"),
    "tril": Case(lambda e: e.scores.tril(), "pair"),
    "tril_below": Case(lambda e: e.scores.tril(-1) @ e.y, "row"),
    "tril_above": Case(lambda e: e.scores.tril(1) @ e.y, "whole"),
    "tril_ones": Case(lambda e: torch.ones(e.S, e.S).tril(), "index"),
    "triu": Case(lambda e: e.scores.triu(1), "pair"),
    "triu_mask": Case(lambda e: torch.full((e.S, e.S), -INF).triu(1), "index"),
    "tril_slice": Case(lambda e: e.scores[:, 1:, 1:].tril() @ e.y[:, 1:], "row"),
    "pad_features": Case(lambda e: F.pad(e.x, (1, 1)), "row"),
    "pad_constant": Case(lambda e: aten.constant_pad_nd.default(e.x, [0, 2], 1.0), "row"),
    "pad_rows_before": Case(lambda e: F.pad(e.x, (0, 0, 2, 0)), "row"),
    "pad_shift_down": Case(lambda e: F.pad(e.x, (0, 0, 1, -1)), "row"),
    "pad_shift_up": Case(lambda e: F.pad(e.x, (0, 0, -1, 1)), "row"),
    "pad_replaces_the_last": Case(lambda e: F.pad(e.x[:, :-2], (0, 0, 0, 2)), "length"),
    "complex_rotary": Case(
        lambda e: torch.view_as_real(torch.view_as_complex(e.x.view(*e.x.shape[:2], 2, 2)) * 1j).flatten(-2), "row"
    ),
    # looking up
    "embedding": Case(lambda e: F.embedding(e.ids, e.table), "row"),
    "embedding_positions": Case(lambda e: F.embedding(e.i, e.table), "index"),
    "index_positions": Case(lambda e: e.table[e.i] * e.x, "row"),
    "index_same_rows": Case(lambda e: e.x[:, e.i], "row"),
    "index_half": Case(lambda e: e.x[:, e.i // 2], "whole", ideal="row"),
    "index_previous": Case(lambda e: e.x[:, (e.i - 1).clamp(min=0)], "whole", ideal="row"),
    "index_previous_wraps": Case(lambda e: e.x[:, e.i - 1], "whole"),
    "index_next": Case(lambda e: e.x[:, (e.i + 1).clamp(max=4)], "whole"),
    "index_data": Case(lambda e: e.x[:, e.ids[0]], "batch"),
    "index_batch": Case(lambda e: e.x[torch.arange(e.x.shape[0])[:, None], e.i], "row"),
    "index_batch_shifted": Case(lambda e: e.x[(torch.arange(e.x.shape[0]) - 1)[:, None], e.i], "batch"),
    "index_table_by_ids": Case(lambda e: e.table[e.ids], "row"),
    "index_mask_buffer": Case(lambda e: e.allowed[e.i - 1], "length"),
    "index_select": Case(lambda e: aten.index_select.default(e.x, 2, e.i[:2]), "row"),
    "index_select_rows": Case(lambda e: aten.index_select.default(e.x, 1, e.i), "whole", ideal="row"),
    "gather_features": Case(lambda e: e.x.gather(2, e.ids[:, :, None].clamp(max=3)), "row"),
    "gather_a_part": Case(lambda e: e.table.gather(1, torch.zeros(5, 1, dtype=torch.long)) + 0.0, "index"),
    "gather_rows": Case(lambda e: e.x.gather(1, e.ids[:, :, None].expand(-1, -1, 4)), "whole"),
    "gather_batch": Case(lambda e: e.x.gather(0, e.ids[:, :, None].clamp(max=1)), "batch"),
    "scatter_features": Case(lambda e: e.x.scatter(2, e.ids[:, :, None].clamp(max=3), e.y[..., :1]), "row"),
    "scatter_value": Case(lambda e: e.x.scatter(2, e.ids[:, :, None].clamp(max=3), 1.5), "row"),
    "scatter_add": Case(lambda e: e.x.scatter_add(2, e.ids[:, :, None].clamp(max=3), e.y[..., :1]), "row"),
    "scatter_multiply": Case(
        lambda e: aten.scatter.reduce(e.x, 2, e.ids[:, :, None].clamp(max=3), e.y[..., :1], reduce="multiply"), "row"
    ),
    "scatter_value_add": Case(
        lambda e: aten.scatter.value_reduce(e.x, 2, e.ids[:, :, None].clamp(max=3), 1.5, reduce="add"), "row"
    ),
    "scatter_amax": Case(
        lambda e: e.x.scatter_reduce(2, e.ids[:, :, None].clamp(max=3), e.y[..., :1], reduce="amax"), "row"
    ),
    "scatter_rows": Case(lambda e: e.x.scatter(1, e.i[None, :, None].expand(e.x.shape).flip(1), e.y), "whole"),
    "scatter_batch": Case(lambda e: e.x.scatter(0, e.ids[:, :, None].clamp(max=1).expand(e.x.shape), e.y), "batch"),
    "scatter_part": Case(lambda e: e.x.scatter(2, e.ids[:, :1, None].clamp(max=3), 1.5), "refused"),
    "one_hot": Case(lambda e: aten.one_hot.default(e.ids, 5), "row"),
    "one_hot_matmul": Case(lambda e: aten.one_hot.default(e.ids, 11).double() @ e.table, "row"),
    # contracting
    "matmul_weight": Case(lambda e: e.x @ e.weight.mT, "row"),
    "matmul_scores": Case(lambda e: e.scores, "pair"),
    "matmul_values": Case(lambda e: e.weights @ e.y, "row"),
    "matmul_unmasked": Case(lambda e: e.scores @ e.y, "whole"),
    "matmul_complement": Case(lambda e: (1.0 - e.weights) @ e.y, "whole"),
    "matmul_wrong_side": Case(lambda e: e.weights.mT @ e.y, "whole"),
    "mm": Case(lambda e: aten.mm.default(e.x.reshape(-1, 4), e.weight.t()), "row"),
    "mv": Case(lambda e: aten.mv.default(e.weight, e.bias), "index"),
    "dot": Case(lambda e: aten.dot.default(e.bias, e.bias), "index"),
    "bmm": Case(lambda e: torch.bmm(e.weights, e.y), "row"),
    "addmm": Case(lambda e: torch.addmm(e.bias[:1], e.x.reshape(-1, 4), e.weight.t()), "row"),
    "baddbmm": Case(lambda e: torch.baddbmm(e.masked * 0.5, e.x, e.y.mT).softmax(-1) @ e.y, "row"),
    "baddbmm_tiny_beta": Case(lambda e: torch.baddbmm(e.finite, e.x, e.y.mT, beta=1e-9).softmax(-1) @ e.y, "whole"),
    "linear": Case(lambda e: F.linear(e.x, e.weight), "row"),
    "linear_bias": Case(lambda e: F.linear(e.x, e.weight, e.weight[:, 0]), "row"),
    "einsum_scores": Case(lambda e: torch.einsum("bid,bjd->bij", e.x, e.y), "pair"),
    "einsum_values": Case(lambda e: torch.einsum("bij,bjd->bid", e.weights, e.y), "row"),
    "einsum_swapped": Case(lambda e: torch.einsum("bij,bid->bjd", e.weights, e.y), "whole"),
    "einsum_batch": Case(lambda e: torch.einsum("bid,cid->bci", e.x, e.y), "row"),
    "einsum_diagonal": Case(lambda e: torch.einsum("bii->bi", e.scores), "refused", ideal="row"),
    "einsum_style": Case(lambda e: torch.einsum("bid,td->bit", e.x, e.style), "row"),
    # attention
    "sdpa_bare": Case(lambda e: sdpa(e.heads, e.heads, e.heads), "whole"),
    "sdpa_causal": Case(lambda e: sdpa(e.heads, e.heads, e.heads, is_causal=True), "row"),
    "sdpa_mask": Case(lambda e: sdpa(e.heads, e.heads, e.heads, attn_mask=e.allowed, scale=0.3), "row"),
    "sdpa_mask_window": Case(
        lambda e: sdpa(e.heads, e.heads, e.heads, attn_mask=e.allowed & (e.i > e.i[:, None] - 2)), "row"
    ),
    "sdpa_mask_next": Case(lambda e: sdpa(e.heads, e.heads, e.heads, attn_mask=e.i <= e.i[:, None] + 1), "whole"),
    "sdpa_mask_padding": Case(
        lambda e: sdpa(e.heads, e.heads, e.heads, attn_mask=e.allowed & e.keep[:, None, None, :]), "row"
    ),
    "sdpa_padding_only": Case(lambda e: sdpa(e.heads, e.heads, e.heads, attn_mask=e.keep[:, None, None, :]), "whole"),
    "sdpa_additive": Case(
        lambda e: sdpa(e.x, e.y, e.y, attn_mask=torch.full((e.S, e.S), -INF).double().triu(1)), "row"
    ),
    "sdpa_additive_finite": Case(lambda e: sdpa(e.x, e.y, e.y, attn_mask=(1.0 - e.allowed.double()) * -1e9), "row"),
    "sdpa_additive_empty": Case(
        lambda e: sdpa(e.x, e.y, e.y, attn_mask=(e.i >= e.i[:, None]).double() * -1e9), "whole"
    ),
    "sdpa_bias": Case(lambda e: sdpa(e.x, e.y, e.y, attn_mask=(e.i - e.i[:, None]).double()), "whole"),
    "sdpa_bias_causal": Case(
        lambda e: sdpa(e.x, e.y, e.y, attn_mask=(e.i - e.i[:, None]).double().masked_fill(~e.allowed, -INF)), "row"
    ),
    "sdpa_learned": Case(lambda e: sdpa(e.x, e.y, e.y, attn_mask=e.masked), "row"),
    "sdpa_gqa": Case(
        lambda e: sdpa(e.heads.repeat(1, 2, 1, 1), e.heads, e.heads, is_causal=True, enable_gqa=True), "row"
    ),
    "sdpa_context": Case(lambda e: sdpa(e.x, e.style[None], e.style[None]), "row"),
    "sdpa_last": Case(lambda e: sdpa(e.x[:, -1:], e.y, e.y), "whole", ideal="row"),
    "sdpa_causal_slice": Case(lambda e: sdpa(e.x[:, 1:], e.y, e.y, is_causal=True), "row"),
    "sdpa_causal_keys_slice": Case(lambda e: sdpa(e.x, e.y[:, 1:], e.y[:, 1:], is_causal=True), "whole"),
    "sdpa_dropout": Case(lambda e: sdpa(e.x, e.y, e.y, is_causal=True, dropout_p=0.5), "random"),
    # convolutions and norms over channels
    "conv1d_items": Case(lambda e: F.conv1d(e.x.reshape(-1, 1, 4), e.weight[:2, None, :3]), "row"),
    "conv1d_rows": Case(lambda e: F.conv1d(e.x.mT, e.weight[..., None].repeat(1, 1, 3)), "whole"),
    "conv2d_items": Case(
        lambda e: F.conv2d(e.heads.transpose(1, 2).reshape(-1, 1, 2, 2), e.weight[:2, None, :2, None]), "row"
    ),
    "conv3d_items": Case(lambda e: F.conv3d(e.x.reshape(-1, 1, 2, 2, 1), e.weight[:2, None, :2, None, None]), "row"),
    "convolution_items": Case(
        lambda e: aten.convolution.default(
            e.x.reshape(-1, 1, 4), e.weight[:2, None, :3], None, [1], [0], [1], False, [0], 1
        ),
        "row",
    ),
    "conv1d_sound": Case(
        lambda e: e.x + F.conv1d(e.sound, e.weight[:1, :, None].repeat(1, 1, 2)[:, :1].expand(-1, 5, -1))[..., :1],
        "row",
    ),
    "group_norm_items": Case(lambda e: F.group_norm(e.x.reshape(-1, 4), 2), "row"),
    "group_norm_rows": Case(lambda e: F.group_norm(e.x.mT, 2), "whole"),
    "glu_features": Case(lambda e: F.glu(e.x, -1), "row"),
    "batch_norm_fixed": Case(lambda e: F.batch_norm(e.x.mT, e.bias, e.bias.exp()), "row"),
    # functions of the context alone
    "renorm_sound": Case(
        lambda e: e.x + aten.renorm.default(e.sound.flatten(1), 2, 1, 0.5).view(e.sound.shape)[:, 0, None], "row"
    ),
    "mean_of_sounds": Case(lambda e: e.x + e.sound.mean(0)[:1], "row"),
    "other_sound": Case(lambda e: e.x + e.sound.flip(0)[:, :1], "row"),
    "renorm_rows": Case(lambda e: aten.renorm.default(e.x.flatten(1), 2, 0, 0.5), "refused"),
    # writes where a mask says
    "fill_rows": Case(lambda e: aten.index_put.default(e.x, [e.keep], torch.zeros((), dtype=torch.float64)), "row"),
    "masked_scatter": Case(lambda e: e.x.masked_scatter((e.ids == 3)[..., None].expand_as(e.x), e.sound), "batch"),
    "table_by_count": Case(lambda e: F.embedding((e.ids == 3).long().cumsum(1) % 5, e.sound.flatten(0, 1)), "row"),
    # writes into the first rows
    "write_first_row": Case(lambda e: written(e.x, 0, e.bias), "row"),
    "write_rows": Case(lambda e: written(e.x, slice(1, 3), e.style[:2]), "row"),
    "write_feature_of_rows": Case(lambda e: written(e.x, slice(1, 3), 2.0), "row"),
    "write_a_later_row": Case(lambda e: written(e.x, 0, e.x[:, 2]), "pair"),
    "write_after_turning": Case(lambda e: written(e.x.roll(2, 1), slice(0, 2), e.bias), "row"),
    "write_less_than_turned": Case(lambda e: written(e.x.roll(2, 1), 0, 0.0), "whole"),
    "write_last_row": Case(lambda e: written(e.x, -1, e.bias), "refused"),
    # grids
    "meshgrid": Case(lambda e: torch.meshgrid(e.i, e.i + 1, indexing="ij")[1] - e.i, "index"),
    "meshgrid_xy": Case(lambda e: (lambda j, i: j <= i)(*torch.meshgrid(e.i, e.i, indexing="xy")), "index"),
    "meshgrid_data": Case(lambda e: torch.meshgrid(e.bias, e.x[0, :, 0], indexing="ij")[1], "batch"),
    # factories
    "zeros": Case(lambda e: torch.zeros(e.S, 4), "index"),
    "ones_like": Case(lambda e: torch.ones_like(e.x), "index"),
    "full_like": Case(lambda e: torch.full_like(e.x, 2.5), "index"),
    "new_zeros": Case(lambda e: e.x.new_zeros(e.S, 4), "index"),
    "new_ones": Case(lambda e: e.x.new_ones(e.S, 4), "index"),
    "new_full": Case(lambda e: e.x.new_full((e.S,), -1e9), "index"),
    "zeros_like": Case(lambda e: torch.zeros_like(e.ids), "index"),
    "full_of_length": Case(lambda e: torch.full((4,), e.S), "length"),
    "scalar_tensor": Case(lambda e: aten.scalar_tensor.default(1.5), "index"),
    "arange_step": Case(lambda e: torch.arange(1, 2 * e.S, 2), "index"),
    "arange_of_float_steps": Case(lambda e: torch.arange(1, e.S + 1, 1.0) * torch.arange(0.0, e.S), "index"),
    "arange_down": Case(lambda e: torch.arange(e.S - 1, -1, -1), "length"),
    "arange_from": Case(lambda e: torch.arange(2, e.S + 2), "index"),
    "arange_halves": Case(lambda e: torch.arange(0, 4, 0.5) + e.S * 0, "index"),
    "arange_bfloat16": Case(lambda e: torch.arange(300, dtype=torch.bfloat16) + 0.0, "index"),
    "cast_uint8": Case(lambda e: (e.i * 100).to(torch.uint8), "index"),
    "bytes_above_minus_one": Case(lambda e: (e.keep.to(torch.uint8) > -1) | (torch.tensor(-1) < e.keep.byte()), "row"),
    "bytes_below_a_large_number": Case(lambda e: e.keep.byte().clamp(max=255) < 300, "row"),
    "bytes_by_minus_one": Case(lambda e: e.keep.byte() % -1 + e.keep.byte() // -1 + e.keep.byte().clamp(min=-5), "row"),
    "cast_bfloat16": Case(lambda e: (e.i + 256).to(torch.bfloat16), "index"),
    "cast_half_compare": Case(lambda e: (e.i + 2048).half() <= (e.i[:, None] + 2048).half(), "index"),
    "linspace": Case(lambda e: torch.linspace(0, 1, 4) + e.x, "row"),
    "logspace": Case(lambda e: torch.logspace(0, 1, 4) + e.x, "row"),
    "windows": Case(
        lambda e: (
            aten.hann_window.default(4)
            + aten.hann_window.periodic(4, False)
            + aten.hamming_window.default(4)
            + aten.blackman_window.default(4)
            + aten.bartlett_window.default(4)
            + aten.kaiser_window.default(4)
            + aten.kaiser_window.periodic(4, False)
            + e.x
        ),
        "row",
    ),
    "triangle_indices": Case(lambda e: torch.tril_indices(4, 4)[:, :4] + torch.triu_indices(4, 4)[:, :4], "index"),
    "eye": Case(lambda e: torch.eye(e.S), "index"),
    "eye_m": Case(lambda e: aten.eye.m(e.S, 4), "index"),
    "rand_like": Case(lambda e: torch.rand_like(e.x), "random"),
    "randint": Case(lambda e: torch.randint(0, 5, (e.S,)), "random"),
}
