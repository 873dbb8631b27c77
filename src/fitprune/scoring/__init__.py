"""What a visual token receives, and the scorers that rank tokens by it."""
