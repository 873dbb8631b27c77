"""Which visual tokens of a picture stay, layer by layer: drawn, animated, and as a page to play with."""
