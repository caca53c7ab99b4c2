"""Small programs, each with the one word that its fact should be: what the transfer rules are held to.

Words: ``row`` and ``pair`` (one or two rows bound an entry), ``index`` (no row matters), ``whole``, ``length``,
``batch`` and ``random`` (the first property that is lost), ``refused``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.analysis.tools import BATCH, ROWS

aten = torch.ops.aten
INF = float("inf")


@dataclass(frozen=True)
class Env:
    """What a program may read; ``S`` is the number of rows."""

    x: Tensor  # [B, S, 4]
    y: Tensor  # [B, S, 4]
    ids: Tensor  # [B, S] in 0..4
    keep: Tensor  # [B, S] bool, the first row kept
    style: Tensor  # [5, 4], a context
    sound: Tensor  # [B, 5, 4], a context of each sequence
    table: Tensor  # [11, 4] float, a weight
    weight: Tensor  # [6, 4], a weight
    bias: Tensor  # [4], a weight

    @property
    def S(self) -> int:
        return self.x.shape[1]

    @cached_property
    def i(self) -> Tensor:
        return torch.arange(self.S)

    @cached_property
    def allowed(self) -> Tensor:
        return self.i <= self.i[:, None]

    @cached_property
    def band(self) -> Tensor:
        """True of a row and the one before it."""
        return self.allowed & (self.i[:, None] - self.i < 2)

    @cached_property
    def scores(self) -> Tensor:
        return self.x @ self.y.mT

    @cached_property
    def masked(self) -> Tensor:
        """Minus infinity outside the triangle."""
        return self.scores.masked_fill(~self.allowed, -INF)

    @cached_property
    def finite(self) -> Tensor:
        """Very negative outside the triangle."""
        return self.scores.masked_fill(~self.allowed, -1e9)

    @cached_property
    def weights(self) -> Tensor:
        """Zero outside the triangle."""
        return self.masked.softmax(-1)

    @cached_property
    def heads(self) -> Tensor:
        """``[B, 2, S, 2]``."""
        return self.x.view(self.x.shape[0], self.S, 2, 2).transpose(1, 2)


def draw(batch: int = BATCH, seed: int = 0) -> list[Tensor]:
    """The inputs of `Env`, in order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keep = torch.rand(batch, ROWS, generator=generator) > 0.4
    keep[:, 0] = True
    ids = torch.randint(0, 5, (batch, ROWS), generator=generator)
    weights = [nn.Parameter(normal(*shape), requires_grad=False) for shape in ((11, 4), (6, 4), (4,))]
    return [normal(batch, ROWS, 4), normal(batch, ROWS, 4), ids, keep, normal(5, 4), normal(batch, 5, 4), *weights]


@dataclass(frozen=True)
class Case:
    """A program and its word. ``ideal`` is the word of a perfect rule, where the fact is needlessly weak."""

    program: Callable[[Env], Any]
    kind: str
    ideal: str = ""


SELF: dict[str, Case] = {
    # pointwise, several operands
    "residual": Case(lambda e: e.x + e.y * 2, "row"),
    "broadcast_pair": Case(lambda e: e.x[:, :, None, 0] - e.x[:, None, :, 0], "pair"),
    "weight_bias": Case(lambda e: e.x * e.bias + e.bias, "row"),
    "style_mean": Case(lambda e: e.x + e.style.mean(0), "row"),
    "where_allowed": Case(lambda e: torch.where(e.allowed, e.scores, 0.0), "pair"),
    "where_data": Case(lambda e: torch.where(e.keep[:, :, None], e.x, e.y), "row"),
    "masked_fill_data": Case(lambda e: e.scores.masked_fill(~e.keep[:, None, :], -INF), "pair"),
    "mask_sum_of_bools": Case(lambda e: (e.allowed + e.allowed).long(), "index"),
    "masked_fill_tensor": Case(lambda e: e.scores.masked_fill(~e.allowed, e.bias[0] * 0 - INF), "pair"),
    "clip": Case(lambda e: aten.clip.default(e.x, -1, 1), "row"),
    "mask_of_data": Case(lambda e: e.allowed & e.keep[:, None, :], "row"),
    "mask_window": Case(lambda e: e.allowed & (e.i > e.i[:, None] - 3), "index"),
    "mask_chunks": Case(lambda e: e.allowed & (e.i // 3 == e.i[:, None] // 3), "index"),
    "mask_not": Case(lambda e: ~(e.i > e.i[:, None]), "index"),
    "additive": Case(lambda e: (1.0 - e.allowed.double()) * -1e9, "index"),
    "length_scale": Case(lambda e: e.x * e.S, "length"),
    "batch_scale": Case(lambda e: e.x * torch.arange(e.x.shape[0])[:, None, None], "batch"),
    "positions_from_the_end": Case(lambda e: e.i - e.S, "length"),
    # numbers in place of what is none
    "finite_weights": Case(lambda e: torch.nan_to_num(e.weights) @ e.x, "row"),
    "finite_weights_of_empty_rows": Case(
        lambda e: torch.nan_to_num(e.scores.masked_fill(e.i >= e.i[:, None], -INF).softmax(-1)) @ e.x, "row"
    ),
    "ones_for_empty_rows": Case(
        lambda e: torch.nan_to_num(e.scores.masked_fill(e.i >= e.i[:, None], -INF).softmax(-1), 1.0) @ e.x, "whole"
    ),
    "finite_scores": Case(lambda e: torch.nan_to_num(e.masked).softmax(-1), "row"),
    "finite_scores_low": Case(lambda e: torch.nan_to_num(e.masked, neginf=-1e9).softmax(-1), "row"),
    "finite_scores_small": Case(lambda e: torch.nan_to_num(e.masked, neginf=-5.0).softmax(-1), "whole"),
    "finite_scores_zero": Case(lambda e: torch.nan_to_num(e.masked, neginf=0.0).softmax(-1), "whole"),
    "finite_scores_zero_sum": Case(lambda e: torch.nan_to_num(e.masked, neginf=0.0) @ e.x, "row"),
    "finite_of_finite_scores": Case(lambda e: torch.nan_to_num(e.finite, neginf=0.0).softmax(-1), "whole", ideal="row"),
    "finite_mask": Case(lambda e: torch.nan_to_num(torch.full((e.S, e.S), -INF).triu(1)), "index"),
    "finite_mask_in_half": Case(lambda e: torch.full((e.S, e.S), -1e9).triu(1).half(), "index"),
    "finite_mask_added": Case(
        lambda e: (e.scores + torch.nan_to_num(torch.full((e.S, e.S), -INF).triu(1))).softmax(-1), "row"
    ),
    "finite_integers": Case(lambda e: torch.nan_to_num(e.i), "index"),
    # softmax and friends
    "softmax_features": Case(lambda e: e.x.softmax(-1), "row"),
    "softmax_unmasked": Case(lambda e: e.scores.softmax(-1), "whole"),
    "softmax_masked": Case(lambda e: e.weights, "row"),
    "softmax_queries": Case(lambda e: e.masked.softmax(-2), "whole"),
    "softmax_finite": Case(lambda e: e.finite.softmax(-1), "row"),
    "softmax_added": Case(lambda e: (e.scores + (1.0 - e.allowed.double()) * -1e9).softmax(-1), "row"),
    "softmax_finite_empty": Case(lambda e: e.scores.masked_fill(e.i >= e.i[:, None], -1e9).softmax(-1), "whole"),
    "softmax_off_by_one": Case(lambda e: e.scores.masked_fill(e.i > e.i[:, None] + 1, -INF).softmax(-1), "whole"),
    "softmax_padding": Case(lambda e: e.scores.masked_fill(~(e.allowed & e.keep[:, None, :]), -1e9).softmax(-1), "row"),
    "softmax_scaled_away": Case(
        lambda e: (e.scores.masked_fill(~e.allowed, -1e4) * 0.2 * 0.2 * 0.2 * 0.2).softmax(-1), "whole"
    ),
    "softmax_mask_cancelled": Case(
        lambda e: (e.scores.masked_fill(~e.allowed, -1e4) + (~e.allowed).double() * 1e4).softmax(-1), "whole"
    ),
    "softmax_mask_times_zero": Case(lambda e: torch.add(e.scores, e.finite, alpha=0).softmax(-1), "whole"),
    "softmax_above_a_low_floor": Case(lambda e: e.finite.clamp(min=-1e9).softmax(-1), "row"),
    "softmax_maximum": Case(lambda e: torch.maximum(torch.full_like(e.scores, -1e5), e.masked).softmax(-1), "row"),
    "softmax_above_a_floor": Case(lambda e: e.finite.clamp(min=-5.0).softmax(-1), "whole"),
    "softmax_below_a_ceiling": Case(lambda e: torch.minimum(e.i.double() - 1e6, e.scores).softmax(-1), "whole"),
    "softmax_log_mask": Case(lambda e: (e.scores + e.allowed.double().log()).softmax(-1), "row"),
    "softmax_log_half": Case(lambda e: (e.scores + (e.allowed * 0.5 + 0.5).log()).softmax(-1), "whole"),
    "softmax_taken_off": Case(lambda e: (e.scores - 1e4 * (1 - e.allowed.double())).softmax(-1), "row"),
    "softmax_past_taken_off": Case(lambda e: (e.scores - 1e9 * e.allowed.double()).softmax(-1), "whole"),
    "index_put_mask": Case(lambda e: aten.index_put(e.scores, [None, ~e.allowed], e.bias[0] * 0 - 1), "pair"),
    "softmax_exp": Case(lambda e: e.masked.exp() / e.masked.exp().sum(-1, keepdim=True), "row"),
    "softmax_exp_epsilon": Case(lambda e: e.masked.exp() / (e.masked.exp().sum(-1, keepdim=True) + 1), "pair"),
    "softmax_exp_of_all": Case(lambda e: e.scores.exp() * e.allowed / e.scores.exp().sum(-1, keepdim=True), "whole"),
    "softmax_batch": Case(lambda e: e.x.softmax(0), "batch"),
    "log_softmax": Case(lambda e: e.x.log_softmax(-1), "row"),
    "log_softmax_masked": Case(lambda e: e.masked.log_softmax(-1).exp(), "row"),
    "layer_norm": Case(lambda e: F.layer_norm(e.x, (4,), e.bias, e.bias), "row"),
    "layer_norm_rows": Case(lambda e: F.layer_norm(e.x.mT, (e.S,)), "whole"),
    "rms_norm": Case(lambda e: F.rms_norm(e.x, (4,), e.bias), "row"),
    # reductions
    "sum_features": Case(lambda e: e.x.sum(-1), "row"),
    "sum_rows": Case(lambda e: e.x.sum(1), "whole"),
    "sum_all": Case(lambda e: e.x.sum(), "batch"),
    "sum_batch": Case(lambda e: e.x.sum(0), "batch"),
    "sum_weights": Case(lambda e: e.weights.sum(-1, keepdim=True), "row"),
    "sum_weights_queries": Case(lambda e: e.weights.sum(-2), "whole"),
    "sum_positions": Case(lambda e: e.i.double().sum(), "length"),
    "mean_features": Case(lambda e: e.x.mean(-1, keepdim=True), "row"),
    "mean_rows": Case(lambda e: e.x.mean(1, keepdim=True), "whole"),
    "mean_weights": Case(lambda e: e.weights.mean(-1), "length"),
    "mean_all": Case(lambda e: e.x.mean(), "batch"),
    "max_all": Case(lambda e: e.x.max(), "batch"),
    "min_all": Case(lambda e: e.x.min(), "batch"),
    "std_all": Case(lambda e: aten.std.default(e.x), "batch"),
    "var_all": Case(lambda e: aten.var.default(e.x), "batch"),
    "amax_features": Case(lambda e: e.x.amax(-1), "row"),
    "amax_masked": Case(lambda e: e.masked.amax(-1, keepdim=True), "row"),
    "amax_weights": Case(lambda e: e.weights.amax(-1), "length"),
    "amax_finite": Case(lambda e: e.finite.amax(-1), "row"),
    "amin_rows": Case(lambda e: e.x.amin(1), "whole"),
    "argmax_features": Case(lambda e: e.x.argmax(-1), "row"),
    "argmin_rows": Case(lambda e: e.x.argmin(1), "whole"),
    "prod_features": Case(lambda e: e.x.prod(-1), "row"),
    "any_features": Case(lambda e: (e.x > 1).any(-1), "row"),
    "any_all": Case(lambda e: (e.x > 1).any(), "batch"),
    "any_dims": Case(lambda e: aten.any.dims(e.x > 1, [1, 2]), "whole"),
    "any_allowed": Case(lambda e: (e.allowed & e.keep[:, None, :]).any(-1), "row"),
    "any_of_a_row_that_sees_itself": Case(lambda e: (e.i - e.i[:, None] > -3).any(-1, keepdim=True), "index"),
    "any_pair": Case(lambda e: e.allowed.any(), "index"),
    "any_of_rows_that_may_be_none": Case(lambda e: e.allowed[3:].any(), "length"),
    "any_of_later_rows": Case(lambda e: (e.i > e.i[:, None]).any(-1), "length"),
    "any_of_rows_that_are_not_there": Case(lambda e: e.allowed[:, :-1].flip(0).any(-1), "length"),
    "any_of_all_but_the_last": Case(lambda e: (e.i[:-1] >= e.i[:, None]).any(-1), "length"),
    "any_of_the_rows_behind": Case(lambda e: (e.i[1:] >= e.i[:, None]).any(-1), "length"),
    "any_of_fractions": Case(lambda e: (e.i * 0.1 - e.i[:, None] * 0.1 + 1).any(-1), "length"),
    "any_of_bytes": Case(lambda e: e.allowed.byte().any(-1), "index"),
    "all_of_a_row_that_sees_itself": Case(lambda e: (e.i > e.i[:, None]).all(-1), "index"),
    "all_of_data": Case(lambda e: ((e.i != e.i[:, None]) & e.keep[:, None]).all(-1), "index"),
    "all_of_a_row_and_later_ones": Case(lambda e: (e.i >= e.i[:, None]).all(-1), "length"),
    "all_rows": Case(lambda e: e.keep.all(1), "whole"),
    "all_all": Case(lambda e: e.keep.all(), "batch"),
    "max_dim_masked": Case(lambda e: e.masked.max(-1, keepdim=True).values, "row"),
    "max_dim_rows": Case(lambda e: e.x.max(1).indices, "whole"),
    "min_dim_features": Case(lambda e: e.x.min(-1).values, "row"),
    "min_dim_masked": Case(lambda e: e.masked.min(-1).values, "whole"),
    "var_features": Case(lambda e: e.x.var(-1), "row"),
    "var_dim": Case(lambda e: aten.var.dim(e.x, [-1]), "row"),
    "var_dim_keepdim": Case(lambda e: aten.var.dim(e.x, [-1], True, True), "row"),
    "var_mean": Case(lambda e: torch.var_mean(e.x, -1, keepdim=True)[1], "row"),
    "var_mean_dim": Case(lambda e: sum(aten.std_mean.dim(e.x, [-1])), "row"),
    "var_mean_rows": Case(lambda e: torch.var_mean(e.x, 1)[0], "whole"),
    "layer_norm_statistics": Case(lambda e: sum(torch.native_layer_norm(e.x, [4], None, None, 1e-5)[1:]), "row"),
    "std_dim": Case(lambda e: aten.std.dim(e.x, [-1]), "row"),
    "std_rows": Case(lambda e: e.x.std(1), "whole"),
    "logsumexp_masked": Case(lambda e: torch.logsumexp(e.masked, -1, keepdim=True), "row"),
    "logsumexp_rows": Case(lambda e: torch.logsumexp(e.x, 1), "whole"),
    "vector_norm": Case(lambda e: torch.linalg.vector_norm(e.x, dim=-1), "row"),
    "vector_norm_rows": Case(lambda e: torch.linalg.vector_norm(e.x, dim=1), "whole"),
    "vector_norm_weights": Case(lambda e: torch.linalg.vector_norm(e.weights, dim=-1), "row"),
    "vector_norm_smallest": Case(lambda e: torch.linalg.vector_norm(e.weights, ord=-INF, dim=-1), "length"),
    "norm_weights": Case(lambda e: aten.norm.ScalarOpt_dim(e.weights, 2.0, [-1]), "row"),
    "topk_features": Case(lambda e: e.x.topk(2, -1).values, "row"),
    "topk_rows": Case(lambda e: e.x.topk(2, 1).values, "whole"),
    "sort_features": Case(lambda e: e.x.sort(-1).values, "row"),
    "sort_rows": Case(lambda e: e.x.sort(1).indices, "whole"),
    "sort_stable": Case(lambda e: e.x.sort(dim=-1, stable=True).values, "row"),
    "sort_batch": Case(lambda e: e.x.sort(0).values, "batch"),
    "argsort_features": Case(lambda e: aten.argsort.default(e.x, -1), "row"),
    "fft_features": Case(lambda e: aten.fft_fft.default(e.x).real, "row"),
    "fft_rows": Case(lambda e: aten.fft_rfft.default(e.x, None, 1).real, "whole"),
    "ifft_features": Case(lambda e: aten.fft_ifft.default(e.x).abs(), "row"),
    "irfft_features": Case(lambda e: aten.fft_irfft.default(aten.fft_rfft.default(e.x)), "row"),
    "hfft_rows": Case(lambda e: aten.fft_hfft.default(e.x, e.S, 1), "whole"),
    "ihfft_features": Case(lambda e: aten.fft_ihfft.default(e.x).real, "refused", ideal="row"),
    "fft2_rows": Case(lambda e: aten.fft_fft2.default(e.x).real, "whole"),
    "ifft2_rows": Case(lambda e: aten.fft_ifft2.default(e.x).real, "whole"),
    "fftn_features": Case(lambda e: aten.fft_fftn.default(e.x, None, [-1]).real, "row"),
    "ifftn_features": Case(lambda e: aten.fft_ifftn.default(e.x, None, [2]).real, "row"),
    "fftn_all": Case(lambda e: aten.fft_fftn.default(e.x).real, "batch"),
    "rfft2_rows": Case(lambda e: aten.fft_rfft2.default(e.x).real, "whole"),
    "rfftn_features": Case(lambda e: aten.fft_rfftn.default(e.x, None, [-1]).real, "row"),
    "irfft2_rows": Case(lambda e: aten.fft_irfft2.default(e.x + 0j), "whole"),
    "irfftn_features": Case(lambda e: aten.fft_irfftn.default(e.x + 0j, None, [-1]), "row"),
    "group_norm_features": Case(lambda e: F.group_norm(e.x.flatten(0, 1), 2), "row"),
    "group_norm_rows": Case(lambda e: F.group_norm(e.x.mT, 2), "whole"),
    "batch_norm_known": Case(lambda e: F.batch_norm(e.x.mT, e.bias, e.bias.abs() + 1).mT, "row"),
    "batch_norm_given": Case(lambda e: F.batch_norm(e.x.mT, None, None, training=True).mT, "batch"),
    "instance_norm_rows": Case(lambda e: F.instance_norm(e.x.mT).mT, "whole"),
    "outer_positions": Case(lambda e: torch.outer(e.i.float(), e.bias), "index"),
    # scans and rearrangements along an axis
    "cumsum_rows": Case(lambda e: e.x.cumsum(1), "row"),
    "cumsum_features": Case(lambda e: e.x.cumsum(-1), "row"),
    "cumsum_ones": Case(lambda e: torch.ones(e.S, dtype=torch.long).cumsum(0) - 1, "index"),
    "cumsum_positions": Case(lambda e: (e.keep.long().cumsum(1) - 1).clamp(min=0), "row"),
    "cumsum_batch": Case(lambda e: e.x.cumsum(0), "batch"),
    "cumsum_tail": Case(lambda e: e.x[:, 2:].cumsum(1), "row"),
    "cumsum_rows_inside": Case(lambda e: e.x.flatten(1).cumsum(1), "row"),
    "cumsum_rows_outside": Case(lambda e: e.x.mT.flatten(1).cumsum(1), "whole"),
    "cumprod_features": Case(lambda e: e.x.cumprod(-1), "row"),
    "cumprod_rows": Case(lambda e: e.x.cumprod(1), "row"),
    "cumprod_rows_outside": Case(lambda e: e.x.mT.flatten(1).cumprod(1), "whole"),
    "logcumsumexp_rows": Case(lambda e: e.x.logcumsumexp(1), "row"),
    "logcumsumexp_batch": Case(lambda e: e.x.logcumsumexp(0), "batch"),
    "cummax_rows": Case(lambda e: e.x.cummax(1).values, "row"),
    "cummin_places": Case(lambda e: e.x.cummin(1).indices, "row"),
    "flip_features": Case(lambda e: e.x.flip(-1), "row"),
    "flip_rows": Case(lambda e: e.x.flip(1), "whole"),
    "flip_batch": Case(lambda e: e.x.flip(0), "batch"),
    "flip_positions": Case(lambda e: e.i.flip(0), "length"),
    "roll_features": Case(lambda e: e.x.roll(1, -1), "row"),
    "roll_rows": Case(lambda e: e.x.roll(1, 1), "whole"),
    "roll_batch": Case(lambda e: e.x.roll(1, 0), "batch"),
    "roll_rows_and_features": Case(lambda e: e.x.roll((1, 1), (1, 2)), "whole"),
    "diff_ids": Case(lambda e: e.ids.diff(prepend=e.ids[:, :1] * 0), "row"),
    "diff_positions": Case(lambda e: e.i.diff(prepend=e.i[:1] - 1), "index"),
    "diff_from_the_last": Case(lambda e: e.ids.diff(prepend=e.ids[:, -1:]), "whole"),
    "diff_alone": Case(lambda e: e.ids.diff(), "refused"),
    "fft_conjugate": Case(lambda e: aten.fft_ifft.default(e.x).real, "refused", ideal="row"),
    "dropout": Case(lambda e: F.dropout(e.x, 0.5), "random"),
    "dropout_off": Case(lambda e: F.dropout(e.x, 0.5, training=False) * 2, "row"),
}
