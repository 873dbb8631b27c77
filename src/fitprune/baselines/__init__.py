"""Published pruning methods and controls, all as recipes of one engine."""
