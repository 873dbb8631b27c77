"""Models of the paper that transformers does not have. Importing them registers nothing: call their `register`."""
