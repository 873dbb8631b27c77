"""The recipe, how many visual tokens each layer keeps: data, rounding, names, the hub."""
