"""Graph to graph: normalise, recognise, plan the cut, rewrite."""
