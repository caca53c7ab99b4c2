"""Positions, masks, scores and outputs that people write, each in a small whole model."""

from tests.coverage.base import VOCAB, Decoder, build
from tests.coverage.masks import MASKS
from tests.coverage.outputs import OUTPUTS
from tests.coverage.positions import POSITIONS
from tests.coverage.scores import SCORES

MODELS: tuple[type[Decoder], ...] = (*POSITIONS, *MASKS, *SCORES, *OUTPUTS)

__all__ = ["MODELS", "VOCAB", "Decoder", "build"]
