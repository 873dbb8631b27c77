"""What knows nothing of pruning: files, journals, registries, pages, charts, plots, insides of transformers."""
