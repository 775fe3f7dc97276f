"""Methods that minimise the convex programs, and the ReLU networks: none knows how its models are certified.

base, monitor   what every solver is; its clock and history
select          all of them by name, and which one a problem gets

`convexhead.drive` joins them to certificates.
"""

from convexhead.solvers.base import Solver, Stop
from convexhead.solvers.monitor import Monitor, Progress
from convexhead.solvers.select import NAMES, SOLVERS

__all__ = ["NAMES", "SOLVERS", "Monitor", "Progress", "Solver", "Stop"]
