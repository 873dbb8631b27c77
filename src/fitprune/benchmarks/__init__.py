"""The paper's benchmarks and some more, from the files that people have, scored by the official rules."""
