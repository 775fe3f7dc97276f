"""What is known about true ReLU heads: bounds on their dual norm, and the way from gated heads to them.

    scores          pre-activations of a small problem as explicit hyperplanes
    faces, bound    the dual norm of a small problem: exactly, or by branch and bound
    ascent          a search for it, for problems of any size
    norm            both together: what is proven, and what was found
    decomposition   gated heads as ReLU heads

The solver is `convexhead.solvers.relu`.
"""

from convexhead.dual_norm.norm import DualNorm, NormOracle
from convexhead.program.decomposition import Decomposition, cone_decomposition

__all__ = ["Decomposition", "DualNorm", "NormOracle", "cone_decomposition"]
