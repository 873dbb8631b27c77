"""The search for a recipe by what the model says on calibration data."""
