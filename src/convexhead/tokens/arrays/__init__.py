"""Tokens that somebody else made: arrays in files, read slice by slice and put into a store."""
