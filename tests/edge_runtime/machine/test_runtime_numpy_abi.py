"""An ONNX Runtime that was built for NumPy 1 is recognised before it gets an array, which would end the process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime.device import _problems
from edgewright.edge_runtime.errors import ProviderError
from edgewright.edge_runtime.machine.numpy_abi import import_onnxruntime
from edgewright.edge_runtime.machine.session_probe import Probe

OLD = "numpy.core._multiarray_umath"
BODY = "__version__ = '1.16.3'\nclass InferenceSession: pass\n"
KINDS = {
    "noise": f"import sys, types\nsys.modules[{OLD!r}] = types.ModuleType('old')\n{BODY}",
    "error": "raise ImportError('numpy.core.multiarray failed to import')\n",
    "said": "import sys\nsys.stderr.write('A module that was compiled using NumPy 1.x')\nraise SystemError('null')\n",
}


@pytest.fixture
def without_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    for name in [n for n in sys.modules if n.partition(".")[0] == "onnxruntime" or n == OLD]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(np, "__version__", "2.1.3")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "onnxruntime.py"
    for name in ("onnxruntime", OLD):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_runtime_for_numpy_1_is_refused_with_what_helps(
    without_runtime: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    without_runtime.write_text(KINDS[kind])
    for _ in range(2):
        with pytest.raises(ProviderError, match=r"built for NumPy 1 and NumPy 2\.1\.3.*pip install 'numpy<2'"):
            import_onnxruntime()
    assert capsys.readouterr().err == "", "one sentence in place of a stack trace"


def test_one_that_somebody_else_imported_is_recognised(without_runtime: Path) -> None:
    without_runtime.write_text(KINDS["noise"])
    import onnxruntime  # noqa: F401

    with pytest.raises(ProviderError, match="numpy<2"):
        import_onnxruntime()


def test_doctor_advises_the_other_numpy_and_no_reinstallation() -> None:
    probe = Probe(False, "built for NumPy 1: pip install 'numpy<2'", advised=True)
    facts = {"onnxruntime_distributions": ["onnxruntime"], "jetson_linux": None, "python": "3.10"}
    assert _problems(facts, probe)[0] == probe.problem


def test_other_runtimes_and_other_errors_pass(without_runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_runtime.write_text("import sys\nsys.stderr.write('a warning')\n" + BODY)
    assert import_onnxruntime().__version__ == "1.16.3"
    assert capsys.readouterr().err == "a warning"
    del sys.modules["onnxruntime"]
    without_runtime.write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    with pytest.raises(ImportError, match="libcudart"):
        import_onnxruntime()
