"""A Python before 3.10, and an ONNX Runtime for NumPy 1 beside NumPy 2: one sentence that helps, and no stack trace."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from edgewright.edge_runtime.bundle.archive import write_runtime_archive

OLD = """import runpy, sys
class Old(tuple): major, minor, micro = VERSION
sys.version_info = Old((*VERSION, 'final', 0))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
RUNTIME = """import sys, types
sys.stderr.write("A module that was compiled using NumPy 1.x cannot be run in NumPy 2 as it may crash.\\n" * 9)
sys.modules["numpy.core._multiarray_umath"] = types.ModuleType("old")
__version__ = "1.17.1"
class SessionOptions: pass
class InferenceSession:
    def __init__(self, *_, **__):
        import os
        os.abort()
def get_available_providers(): return ["CPUExecutionProvider"]
"""


def said(name, done, code, *words):
    text = (done.stderr + done.stdout).strip()
    right = done.returncode == code and all(word in text for word in words) and "Traceback" not in text
    print("right" if right else "wrong", f"{name}: exit code {done.returncode}, {text[-150:]!r}")


def main():
    archive = Path("edge_runtime.pyz").absolute()
    write_runtime_archive(archive)
    launch = Path(find_spec("edgewright_launch").origin)
    for version in ((3, 6, 15), (3, 9, 18)):
        for path in (archive, launch):
            command = [sys.executable, "-c", OLD.replace("VERSION", repr(version)), str(path), "doctor"]
            done = subprocess.run(command, capture_output=True, text=True)
            name = f"python_{version[0]}_{version[1]}_{path.stem}"
            said(name, done, 2, "3.10 or newer")
    Path("old").mkdir()
    Path("old/onnxruntime.py").write_text(RUNTIME)
    if int(np.__version__.partition(".")[0]) > 1:
        environment = {**os.environ, "PYTHONPATH": str(Path("old").absolute())}
        command = [sys.executable, str(archive), "doctor"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        said("runtime_for_numpy_1", done, done.returncode or 99, "numpy<2", "PROBLEM")


main()
