"""Models that break causality, or the independence of the texts in a batch, in one small place each."""

from tests.adversarial import batches, lengths, masks, rows
from tests.adversarial.base import Breaks, Case, Model
from tests.adversarial.near_misses import NEAR_MISSES

FUTURE, LENGTH, BATCH, CHANCE = "KV202", "KV203", "KV204", "KV205"
UNKNOWN, EMPTY, SHAPE, NOT_INCREMENTAL = "KV201", "KV206", "KV207", "KV208"


def _cases(breaks: Breaks, codes: tuple[str, ...], *models: type[Model]) -> tuple[Case, ...]:
    return tuple(Case(model, breaks, frozenset(codes)) for model in models)


CASES: tuple[Case, ...] = (
    *_cases(
        "future",
        (FUTURE,),
        masks.OffByOneMask,
        masks.TriangleFromDiagonalOne,
        masks.Bidirectional,
        masks.PrefixLm,
        masks.TwoSidedWindow,
        masks.BlockCausal,
        masks.ReversedMask,
        masks.TransposedTriangle,
        masks.FlippedEntry,
        masks.OneLayerForgets,
        masks.OneHeadForgets,
        masks.WrongSoftmaxAxis,
        masks.MaskAfterSoftmax,
        masks.FilledWithZero,
        masks.FilledWithMinusFive,
        masks.MaxOverAllScores,
        masks.ScoresScaledByRow,
        masks.LinearAttention,
        rows.MeanOverTime,
        rows.MaxOverTime,
        rows.NormOverTime,
        rows.LayerNormOverText,
        rows.SoftmaxOverTime,
        rows.NextRow,
        rows.RemainderOfSum,
        rows.SymmetricConvolution,
        rows.LastRowForAll,
        rows.HistogramOfTokens,
    ),
    *_cases("future", (EMPTY,), masks.EmptiedRow),
    # Ops that need no rule of their own: to know them by name is enough to refuse them.
    *_cases(
        "future",
        (FUTURE, UNKNOWN),
        masks.ShiftedKeys,
        rows.InstanceNorm,
        rows.Roll,
        rows.Flip,
        rows.CumsumFromTheRight,
        rows.SortOverTime,
        rows.TopKOverTime,
        rows.ArgmaxOverTime,
        rows.ArgsortOverTime,
        rows.FourierOverTime,
        rows.BackwardRecurrence,
    ),
    *_cases(
        "length",
        (LENGTH,),
        lengths.LogLength,
        lengths.DividedByLength,
        lengths.LengthInTheScale,
        lengths.PositionsFromTheEnd,
        lengths.RelativePositions,
        lengths.TableFromTheEnd,
        lengths.ParityOfLength,
        lengths.MeanOfPositions,
        lengths.WindowOfHalf,
    ),
    *_cases(
        "batch",
        (BATCH,),
        batches.MeanOverBatch,
        batches.MaxOverBatch,
        batches.AttentionOverBatch,
        batches.SoftmaxOverBatch,
        batches.CumsumOverBatch,
    ),
    *_cases(
        "batch", (BATCH, UNKNOWN, FUTURE), batches.BatchStatistics, batches.NeighbourInBatch, batches.FirstTextForAll
    ),
    *_cases("chance", (CHANCE,), batches.Dropout, batches.Noise, batches.CoinFlips),
)

__all__ = ["CASES", "NEAR_MISSES", "Case", "Model"]
