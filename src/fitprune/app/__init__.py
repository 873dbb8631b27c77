"""The web page `fitprune app`: move a budget, and see what leaves, with the answer, time and memory beside dense."""
