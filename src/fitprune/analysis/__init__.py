"""What attention statistics look like, and how firmly they fix a recipe."""
