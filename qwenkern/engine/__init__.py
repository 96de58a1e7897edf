"""From requests to tokens: who runs in a step, the pass itself, and what a caller gets."""
