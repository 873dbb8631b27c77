"""What knows nothing of pruning: files, journals, processes, text tables, plots, and the insides of transformers."""
