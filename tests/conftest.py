"""Shape and dtype annotations are checked while the tests run (jaxtyping with beartype)."""

import sys
from pathlib import Path

from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
CHECKED = ["heads", "activation", "losses", "problem", "relu", "spectral", "certificate", "solvers"]
install_import_hook([f"convexhead.{module}" for module in CHECKED], "beartype.beartype")
