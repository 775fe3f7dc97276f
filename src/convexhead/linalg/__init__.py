"""What solvers and certificates share: Krylov spaces, gradient matrices, quasi-Newton pairs."""
