"""Shape and dtype annotations are checked while the tests run (jaxtyping with beartype)."""

import os
import tempfile

from jaxtyping import install_import_hook

CHECKED = ["program", "dual_norm", "linalg", "certificate", "solvers"]
# Notes about verified shards do not go into the cache folder of whoever runs the tests.
_cache = tempfile.TemporaryDirectory(prefix="convexhead-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name
install_import_hook([f"convexhead.{module}" for module in CHECKED], "beartype.beartype")
