"""The search for a recipe by what the model says."""
