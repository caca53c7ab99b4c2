"""A decode step as one call into compiled code, and a prompt as one between two products.

The incremental graph is a long list of small ops between products that stream the weights and attentions that stream
the cache. Here it becomes a tape: each op a function in C++ that is made once for all places where it stands alike,
so that thirty equal layers are compiled as one; its operands are places in a table. Memory is planned ahead. What C++
has no words for runs as it is written, between two stretches of the tape. With many rows, neighbours that treat each
row for itself go through the rows together, block by block.
"""

from kvpass.lowering.tape.tape import OutOfRange, Tape, Unexpected
from kvpass.lowering.tape.trace import Operand, Untraceable

__all__ = ["Operand", "OutOfRange", "Tape", "Unexpected", "Untraceable"]
