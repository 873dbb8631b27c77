"""The recipe: how many visual tokens each layer keeps. Data, found by name, shared on the hub."""
