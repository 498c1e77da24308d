"""What devices measured, written into a bundle's manifest: which layout was faster, and where."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .archive import write_runtime_archive
from .bundle import Bundle, open_bundle, pack_zip, write_manifest
from .errors import InputError
from .manifest import RUNTIME_FILE, DeviceLatency, SplitRatio


def record_latency(
    bundle: str | os.PathLike[str] | Bundle, tables: Sequence[Mapping[str, Any]], out: str | os.PathLike[str]
) -> None:
    """Writes a bundle like this one whose manifest also says what `tables` measured (`Manifest.measured`).

    The bundle that was given stays as it is. In the new one a device that is there already gets its new numbers, and
    the runtime archive is that of this release, which knows the field; every other file is the same.

    Args:
        bundle: folder, zip or open `Bundle`.
        tables: from `latency_table`, of this very bundle, each from another device.
        out: the folder, or with the ending ``.zip`` the zip, to write; it must not exist.

    Raises:
        BundleError: the bundle is not intact.
        InputError: a table of another bundle, or `out` exists, lies in the bundle or cannot be written.
    """
    target = Path(out)
    check_record_target(target)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    try:
        if opened.source.is_dir() and target.resolve().is_relative_to(opened.source.resolve()):
            raise InputError(f"cannot write {target}: it lies in the bundle, which is immutable; write it beside it")
        measured = {entry.device: entry for entry in opened.manifest.measured}
        for table in tables:
            if table["bundle_sha256"] != opened.sha256:
                raise InputError(
                    f"the latency table of {table['device']} was measured on another bundle than {opened.source}: "
                    f"manifest {table['bundle_sha256']}, not {opened.sha256}; measure this one"
                )
            measured[table["device"]] = _entry(table)
        manifest = replace(opened.manifest, measured=tuple(measured.values()))
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            work = Path(scratch, "bundle")
            for name in opened.manifest.files:
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(opened.path(name), work / name)
            write_runtime_archive(work / RUNTIME_FILE)
            write_manifest(work, manifest)
            if target.suffix == ".zip":
                pack_zip(work, target)
            else:
                work.rename(target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        if opened is not bundle:
            opened.close()


def check_record_target(target: Path) -> None:
    """Holds the place for a new bundle to what can be said before anything is measured.

    Raises:
        InputError: it exists, or its folder does not.
    """
    if target.exists():
        raise InputError(f"cannot write {target}: it exists; choose a new name for the bundle with the measurement")
    if not target.resolve().parent.is_dir():
        raise InputError(f"cannot write {target}: there is no folder {target.resolve().parent}")


def _entry(table: Mapping[str, Any]) -> DeviceLatency:
    wanted = [field.name for field in fields(SplitRatio)]
    ratios = table["split_over_file"] or ()
    return DeviceLatency(
        device=table["device"],
        exits_us={layout: tuple(figures["exits"]) for layout, figures in table["layouts"].items()},
        split_over_file=tuple(SplitRatio(**{name: ratio[name] for name in wanted}) for ratio in ratios),
    )
