"""The whole compiler, in order. Read this first."""

from __future__ import annotations

from functools import partial

from kvpass.analysis.sweep import analyze
from kvpass.ir import Captured
from kvpass.lowering import ops
from kvpass.lowering.choose import lower, prepare
from kvpass.transforms.latent import expose
from kvpass.transforms.normalise import normalise
from kvpass.transforms.plan import plan
from kvpass.transforms.recognise import recognise
from kvpass.transforms.rewrite import Incremental, rewrite
from kvpass.transforms.zeros import without_zeros


def incrementalise(captured: Captured, *, autotune: bool = False) -> Incremental:
    """From a captured graph to one that computes new rows only.

    Args:
        autotune: kernels of a GPU are measured in several configurations when they are first called.

    Raises:
        Refusal: the proof did not go through; the graph is to be run as it is.
    """
    normalise(captured)  # one spelling for what means the same
    analyzed = analyze(captured)  # facts: on which rows does each value depend?
    if without_zeros(analyzed):  # terms that a mask of zeros takes away
        analyzed = analyze(captured)
    cut = plan(analyzed)  # demand, proof, and what to store
    attentions, _ = recognise(analyzed)  # softmax attention, whatever it is spelled like
    latents = expose(analyzed, attentions)  # keys and values that are made from one narrow row
    if latents:  # the graph has them as values now
        analyzed = analyze(captured)
        cut = plan(analyzed, frozenset(lift for latent in latents.values() for lift in latent.lifts))
        attentions, _ = recognise(analyzed)
    specs = [(match.spec, node.meta["val"].device) for node, match in attentions.items()]
    specs += [(latent.absorbed(latent.spec), node.meta["val"].device) for node, latent in latents.items()]
    prepare(specs)  # compile, side by side
    return rewrite(cut, ops, attentions, partial(lower, autotune=autotune), latents)  # from the outputs, by demand
