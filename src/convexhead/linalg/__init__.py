"""Solvers and certificates share these: Krylov spaces, gradient matrices, quasi-Newton pairs."""
