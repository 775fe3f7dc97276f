"""How far from the optimum a model is, at most.

dual      a residual as a dual point, with all charges for rounding
certify   the bound on the norm of its gradient matrices, and the certificate
"""

from convexhead.certificate.certify import Certificate, certify_atoms

__all__ = ["Certificate", "certify_atoms"]
