"""Whole experiments: what the command line runs."""
