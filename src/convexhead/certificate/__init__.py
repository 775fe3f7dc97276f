"""A certificate bounds how far a model is from the optimum.

certificate      what it says, and what its fields must agree on
certify          the objective, the dual point and the bound of one model
dual             a residual as a dual point, with all charges for rounding
spectral_bound   the norm of gradient matrices that are too large to decompose
"""

from convexhead.certificate.certificate import Certificate
from convexhead.certificate.certify import certify_atoms

__all__ = ["Certificate", "certify_atoms"]
