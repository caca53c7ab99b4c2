"""Text from a model: sessions, sampling, speculation."""

from kvpass.generation.loop import Generation, generate, stream
from kvpass.generation.session import Session, open

__all__ = ["Generation", "Session", "generate", "open", "stream"]
