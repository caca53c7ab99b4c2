"""One attention, written in the many ways that people write it.

Every function takes `q[B, H, S, D]`, `k[B, K, S, D]`, `v[B, K, S, E]`, `allowed` (bool, `[S, S]`, true where query `i`
may see key `j`) and a scale, and returns `[B, H, S, E]`. All of them give the same answer; a compiler that sees
a KV cache in one of them has to see it in all.
"""

from tests.spellings import fused, masks, normalisers, products
from tests.spellings.base import NEG_INF, Spelling, repeat_kv

SPELLINGS: dict[str, Spelling] = {
    f.__name__: f
    for f in (
        fused.sdpa_bool_mask,
        fused.sdpa_float_mask,
        fused.sdpa_is_causal,
        fused.sdpa_enable_gqa,
        fused.sdpa_default_scale,
        fused.sdpa_mask_per_head,
        fused.sdpa_float_mask_per_batch,
        fused.sdpa_finfo_mask,
        fused.sdpa_three_axes,
        fused.sdpa_five_axes,
        fused.sdpa_gqa_is_causal,
        fused.sdpa_rows_first,
        fused.sdpa_scaled_query,
        fused.sdpa_head_by_head,
        masks.masked_fill_inf,
        masks.masked_fill_finfo,
        masks.masked_fill_in_place,
        masks.where_inf,
        masks.where_tensor_fill,
        masks.additive_inf,
        masks.additive_1e9,
        masks.additive_commuted,
        masks.baddbmm_mask,
        masks.masked_fill_1e4,
        masks.where_chain,
        masks.where_reversed,
        masks.where_number_mask,
        masks.mask_by_index,
        masks.mask_by_vmap,
        masks.mask_written_in_place,
        masks.scores_by_index,
        masks.additive_finfo,
        masks.additive_floor,
        masks.additive_log,
        masks.multiplied_and_added,
        masks.zeroed_again,
        masks.multiplied_again,
        products.bmm_merged,
        products.einsum_bhij,
        products.einsum_rows_first,
        products.einsum_keys_first,
        products.grouped_matmul,
        products.grouped_einsum,
        products.head_loop,
        products.vmap_heads,
        products.repeat_interleave,
        products.scale_before,
        products.scale_split,
        products.scale_after_mask,
        products.einsum_ellipsis,
        products.einsum_heads_last,
        products.einsum_heads_first,
        products.einsum_columns,
        products.values_first,
        products.baddbmm_unread,
        products.grouped_heads_outside,
        products.grouped_rows,
        products.head_loop_joined,
        products.einops_merged,
        products.einops_grouped,
        products.scale_tensor,
        products.scale_in_place,
        normalisers.softmax_fp32,
        normalisers.softmax_by_hand,
        normalisers.log_softmax_exp,
        normalisers.logsumexp_by_hand,
        normalisers.triangle_times_exp,
        normalisers.normalise_last,
        normalisers.softmax_shifted,
        normalisers.softmax_of_columns,
        normalisers.dropout_off,
        normalisers.exp_without_maximum,
        normalisers.exp2_log2e,
        normalisers.power_of_e,
        normalisers.reciprocal_of_sum,
        normalisers.triangle_of_exp,
        normalisers.log_space,
        normalisers.logsumexp_unsqueezed,
        normalisers.exp_in_fp32,
        normalisers.normalise_last_einsum,
        normalisers.normalise_last_rows,
    )
}

CAUSAL_ONLY = frozenset({"sdpa_is_causal", "sdpa_gqa_is_causal", "triangle_of_exp"})
"""Spellings that do not look at `allowed`."""

PADDABLE = frozenset({"sdpa_bool_mask", "sdpa_enable_gqa", "masked_fill_finfo", "where_tensor_fill", "additive_1e9"})
"""Spellings that take `allowed` as `[B, 1, S, S]`, and whose answer is finite where a row has no key left."""

PER_HEAD = frozenset({"head_loop", "sdpa_head_by_head", "head_loop_joined"})
"""Spellings that are one attention for each head."""

__all__ = ["CAUSAL_ONLY", "NEG_INF", "PADDABLE", "PER_HEAD", "SPELLINGS", "Spelling", "repeat_kv"]
