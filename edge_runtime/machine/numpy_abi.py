"""An ONNX Runtime that was built for NumPy 1, beside NumPy 2: it imports with noise, and dies when it gets an array."""

from __future__ import annotations

import contextlib
import io
import sys
from types import ModuleType
from typing import Any

from ..errors import ProviderError

_OLD_WAY = "numpy.core._multiarray_umath"
"""NumPy 2 keeps this module for extensions of NumPy 1 alone; its own are called numpy._core."""
_SIGNS = ("_ARRAY_API not found", "numpy.core.multiarray failed to import", "compiled against ABI", "using NumPy 1")
_BEFORE_NUMPY_2 = tuple(f"1.{minor}." for minor in range(19))


def import_onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        ProviderError: it was built for another NumPy than the one that is installed.
        ImportError: it is not there, or broken in another way.
    """
    import numpy

    newer = int(numpy.__version__.partition(".")[0]) > 1
    loaded: ModuleType | None = sys.modules.get("onnxruntime")
    if loaded is not None and hasattr(loaded, "InferenceSession"):
        version = str(getattr(loaded, "__version__", ""))
        # somebody else's import: who used the old way can only be guessed
        if newer and _OLD_WAY in sys.modules and version.startswith(_BEFORE_NUMPY_2):
            raise ProviderError(_mismatch(numpy.__version__, version))
        return loaded
    before, said = _OLD_WAY in sys.modules, io.StringIO()
    try:
        # NumPy tells of it at length, with a stack trace, and goes on
        with contextlib.redirect_stderr(said):
            import onnxruntime
    except Exception as error:
        if any(sign in f"{error} {error.__cause__} {said.getvalue()}" for sign in _SIGNS):
            raise ProviderError(_mismatch(numpy.__version__, "")) from error
        sys.stderr.write(said.getvalue())
        raise
    if newer and not before and _OLD_WAY in sys.modules:
        version = str(getattr(onnxruntime, "__version__", ""))
        # whoever comes next must not find it loaded and take it for sound
        del sys.modules["onnxruntime"], sys.modules[_OLD_WAY]
        raise ProviderError(_mismatch(numpy.__version__, version))
    sys.stderr.write(said.getvalue())
    return onnxruntime


def _mismatch(numpy_version: str, version: str) -> str:
    if int(numpy_version.partition(".")[0]) < 2:
        return (
            f"this ONNX Runtime was built for another NumPy than the installed {numpy_version}: install a newer one, "
            "pip install --upgrade numpy"
        )
    return (
        f"ONNX Runtime {version or '(of this Python)'} was built for NumPy 1 and NumPy {numpy_version} is installed, "
        "which ends the process as soon as it gets an array: pip install 'numpy<2', or an ONNX Runtime that was built "
        "for NumPy 2 (from 1.19 on)"
    )
