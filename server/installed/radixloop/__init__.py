"""The front-end language, where the wheel is installed: `import radixloop as sgl`.

This module becomes the one in `server/lang`, found by its place on disk: a program's own package `server` is neither
imported nor in the way.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.lang import *  # noqa: F403

_HERE = Path(__file__).parent
# In the wheel `server` lies beside this package; in a checkout, above it.
_LANGUAGE = next(
    place for place in (_HERE.parent / "server" / "lang", _HERE.parents[1] / "lang") if (place / "__init__.py").exists()
)
_spec = importlib.util.spec_from_file_location(
    __name__, _LANGUAGE / "__init__.py", submodule_search_locations=[str(_LANGUAGE), str(_HERE)]
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[__name__] = _module
_spec.loader.exec_module(_module)
