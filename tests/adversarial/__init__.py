"""Models that break causality, or the independence of the texts in a batch, in one small place each."""

from tests.adversarial import batches, lengths, masks, near_misses, normalisers, recurrences, rows
from tests.adversarial.base import Breaks, Case, Model

FUTURE, LENGTH, BATCH, CHANCE = "KV202", "KV203", "KV204", "KV205"
UNKNOWN, EMPTY, SHAPE, NOT_INCREMENTAL = "KV201", "KV206", "KV207", "KV208"
STATIC, BREAK = "KV101", "KV104"


def _cases(breaks: Breaks, codes: tuple[str, ...], *models: type[Model]) -> tuple[Case, ...]:
    return tuple(Case(model, breaks, frozenset(codes)) for model in models)


NEAR_MISSES: tuple[type[Model], ...] = (*near_misses.NEAR_MISSES, *normalisers.CAUSAL)

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
        masks.MaskAfterSoftmax,
        masks.FilledWithZero,
        masks.FilledWithMinusFive,
        masks.ScoresScaledByRow,
        masks.LinearAttention,
        masks.PrefixOfTokens,
        masks.PackedByPositionAlone,
        rows.MeanOverTime,
        rows.MaxOverTime,
        rows.NormOverTime,
        rows.SoftmaxOverTime,
        rows.RemainderOfSum,
        rows.LastRowForAll,
        rows.TokenMixing,
        rows.StreamsAhead,
    ),
    *_cases("future", (EMPTY,), masks.EmptiedRow),
    # A maximum over queries combines whole matrices of pairs.
    *_cases("future", (FUTURE, NOT_INCREMENTAL), *normalisers.NOT_CAUSAL),
    # Whole matrices of pairs are combined: the future is in them, and they cannot be cut into rows.
    *_cases("future", (FUTURE, NOT_INCREMENTAL), masks.WrongSoftmaxAxis, masks.MaxOverAllScores),
    *_cases("future", (FUTURE, SHAPE), rows.NextRow, rows.NextRowWritten, rows.WindowsAhead),
    *_cases("future", (FUTURE, SHAPE, LENGTH), rows.StreamsMixedUp, rows.StreamsCutElsewhere),
    # Dynamo itself does not look into a GRU.
    *_cases("future", (FUTURE, UNKNOWN, BREAK, STATIC), rows.BackwardRecurrence),
    # Ops that need no rule of their own: to know them by name is enough to refuse them.
    *_cases(
        "future",
        (FUTURE, UNKNOWN),
        masks.ShiftedKeys,
        rows.InstanceNorm,
        rows.LayerNormOverText,
        rows.SymmetricConvolution,
        rows.ConvolutionMaskedOneTapShort,
        rows.HistogramOfTokens,
        rows.Roll,
        rows.Flip,
        rows.CumsumFromTheRight,
        rows.SortOverTime,
        rows.TopKOverTime,
        rows.ArgmaxOverTime,
        rows.ArgsortOverTime,
        rows.FourierOverTime,
        rows.RealFourierOverTime,
        rows.FourierOverBoth,
        rows.PoolOverTime,
    ),
    *_cases(
        "length",
        (LENGTH,),
        lengths.DividedByLength,
        lengths.LogLengthInTheGraph,
        lengths.LengthInTheScale,
        lengths.PositionsFromTheEnd,
        lengths.TableFromTheEnd,
        lengths.ParityOfLength,
        lengths.MeanOfPositions,
        lengths.WindowOfHalf,
        lengths.LogLengthScaling,
        lengths.DistanceFromTheEnd,
        lengths.DistanceThatSaturates,
        lengths.DistanceAsFactor,
        lengths.DistanceUnmasked,
    ),
    # Each of their rows reads a state that the row before it left; Dynamo writes one graph for each length, or several.
    *_cases(
        "nothing",
        (STATIC, BREAK),
        recurrences.SelectiveScan,
        recurrences.WeightedKeyValue,
        recurrences.GatedDelta,
        recurrences.ChunkedState,
        recurrences.Recurrent,
    ),
    # A length that Python's own arithmetic swallows becomes a constant: such a graph is good for one length only.
    *_cases(
        "length",
        (LENGTH, STATIC),
        lengths.LogLength,
        lengths.RelativePositions,
        lengths.DynamicNtk,
        lengths.DistanceBesideAScale,
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
        "batch",
        (BATCH, UNKNOWN, FUTURE),
        batches.BatchStatistics,
        batches.NeighbourInBatch,
        batches.NeighbourJoined,
        batches.FirstTextForAll,
    ),
    *_cases("chance", (CHANCE,), batches.Dropout, batches.Noise, batches.CoinFlips),
)

__all__ = ["BREAK", "CASES", "NEAR_MISSES", "STATIC", "Case", "Model"]
