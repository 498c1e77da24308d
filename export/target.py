"""An export for a kind of device: what its runtime cannot read is refused before a bundle is written."""

from __future__ import annotations

from dataclasses import replace

from edgewright.edge_runtime.bundle.manifest import Manifest
from edgewright.edge_runtime.errors import ExportError, InputError
from edgewright.edge_runtime.targets.target import target_named


def known_target(name: str) -> str:
    """`name`, for a field of a configuration.

    Raises:
        ValueError: no target that ships has this name; pydantic names the field.
    """
    try:
        target_named(name)
    except InputError as error:
        raise ValueError(str(error)) from None
    return name


def held_to(name: str | None, manifest: Manifest) -> Manifest:
    """The manifest with a note about the target.

    The note, and no field of its own, because readers of schema version 1 refuse fields that they do not know.

    Args:
        name: of the target; None: nothing is asked.
        manifest: of the finished files.

    Raises:
        ExportError: the target's oldest ONNX Runtime does not read the file.
    """
    if name is None:
        return manifest
    target = target_named(name)
    for what, has, newest, advice in (
        ("opset", manifest.opset, target.opset, f"set export.opset to {target.opset} or less"),
        ("IR version", manifest.ir_version, target.ir_version, "set a lower export.opset"),
    ):
        if has > newest:
            raise ExportError(
                f"the file has {what} {has}, and onnxruntime {target.oldest_onnxruntime}, the oldest of the target "
                f"{name!r}, reads {newest} at most: {advice}, or take another export.target"
            )
    note = (
        f"exported for the target {name!r}: onnxruntime {target.oldest_onnxruntime} and newer read opset "
        f"{manifest.opset} and IR version {manifest.ir_version}"
    )
    return replace(manifest, notes=(*manifest.notes, note))
