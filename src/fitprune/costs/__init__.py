"""What a decoder costs: its sizes, FLOPs, bytes and seconds. Knows no model."""
