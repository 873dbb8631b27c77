"""What knows nothing of pruning: files, journals, registries, plots, insides of transformers."""
