"""The child process of `simplify`: ``python -m edgewright.export.graph.simplifier_process METHOD IN OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from edgewright.edge_runtime.process.watched import watch_parent


def main() -> None:
    """Reads IN, simplifies with METHOD, writes OUT."""
    watch_parent()
    method, source, target = sys.argv[1:]
    if method == "onnxscript":
        import onnx_ir
        import onnxscript.optimizer

        from .model_file import save_external

        model = onnx_ir.load(source)
        onnxscript.optimizer.optimize(model)
        save_external(model, Path(target))
    elif method == "onnxsim":
        import onnx
        import onnxsim

        simplified, sound = onnxsim.simplify(onnx.load(source))
        if not sound:
            raise SystemExit("onnxsim's own check failed")
        onnx.save(simplified, target)
    else:
        raise SystemExit(f"unknown simplifier {method!r}")


if __name__ == "__main__":
    main()
