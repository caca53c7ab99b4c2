"""A grammar of random causal Transformers."""

from tests.models.config import Config
from tests.models.inputs import Call, Tokens, make_call
from tests.models.transformer import Transformer, build

__all__ = ["Call", "Config", "Tokens", "Transformer", "build", "make_call"]
