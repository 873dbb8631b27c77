"""The `fitprune` command, one file for each command."""
