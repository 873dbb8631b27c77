"""The paper's method: from attention statistics and a budget to a recipe. Knows no model."""
