"""How tokens leave: a recipe at work inside a model."""
