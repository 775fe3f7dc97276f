"""The usual ways to a head, to compare with: Adam on the same head, and the probes of the field."""
