"""What can be known of a captured graph without running it: facts, index expressions, the causality proof."""
