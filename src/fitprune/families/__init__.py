"""What is known of models: their families, parts, images and inputs, and how they are loaded."""
