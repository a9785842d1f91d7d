"""Weights in and out: hub directories, Adept's release files, vocabulary pruning."""
