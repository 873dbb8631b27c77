"""What methods keep and what they cost, against the dense model on the same questions."""
