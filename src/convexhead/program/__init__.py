"""The convex program of a head: tokens, activation, loss, and passes over the samples."""
