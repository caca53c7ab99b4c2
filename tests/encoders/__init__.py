"""Small whole models of an encoder and a decoder, and of a prefix of the context in front of text."""

from tests.encoders.models import T5, Bart, Mixing, Placeholders, Prefix, Whisper

__all__ = ["T5", "Bart", "Mixing", "Placeholders", "Prefix", "Whisper"]
