"""What devices measured, written into a bundle's manifest: which layout was faster, and where."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import BundleError, InputError
from .archive import write_runtime_archive
from .bundle import Bundle, open_bundle, pack_zip, write_manifest
from .consistency import measurement_key, unfit_measurement
from .manifest import RUNTIME_FILE, DeviceLatency, Manifest, SplitRatio
from .replacing import check_place
from .typed_json import typed


def record_latency(
    bundle: str | os.PathLike[str] | Bundle, tables: Sequence[Mapping[str, Any]], out: str | os.PathLike[str]
) -> None:
    """Writes a bundle like this one whose manifest also says what `tables` measured (`Manifest.measured`).

    The bundle that was given stays as it is. In the new one the runtime archive is that of this release, which knows
    the field; every other file is the same. A device that is in the manifest already gets its new numbers.

    Args:
        bundle: folder, zip or open `Bundle`.
        tables: from `latency_table`, of this very bundle, each from another device or with other settings.
        out: the folder, or with the ending ``.zip`` the zip, to write; it must not exist.

    Raises:
        BundleError: the bundle is not intact, or was altered since it was opened.
        InputError: a table that is none, or of another bundle, or two of one device; or `out` exists, lies in the
            bundle or cannot be written.
    """
    target = Path(out)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    try:
        check_record_target(target, opened.source)
        manifest = _with_measurements(opened, tables)
        try:
            _write(opened, manifest, target)
        except OSError as error:
            raise InputError(f"cannot write {target} from {opened.source}: {error}") from None
    finally:
        if opened is not bundle:
            opened.close()


def check_record_target(target: Path, bundle: Path) -> None:
    """Holds the place for a new bundle to what can be said before anything is measured.

    Raises:
        InputError: it exists, lies in `bundle`, or its folder does not exist or cannot be written.
    """
    check_place(target, bundle)
    if os.path.lexists(target):
        raise InputError(f"cannot write {target}: it exists; choose a new name for the bundle with the measurement")


def _with_measurements(bundle: Bundle, tables: Sequence[Mapping[str, Any]]) -> Manifest:
    new: dict[tuple[str, str, str], DeviceLatency] = {}
    for number, table in enumerate(tables):
        entry = _entry(table, f"latency table {number}")
        if table["bundle_sha256"] != bundle.sha256:
            raise InputError(
                f"the latency table of {entry.device} was measured on another bundle than {bundle.source}: "
                f"manifest {table['bundle_sha256']}, not {bundle.sha256}; measure this one"
            )
        if reason := unfit_measurement(bundle.manifest, entry):
            raise InputError(f"the latency table of {entry.device} does not fit {bundle.source}: {reason}")
        if new.setdefault(measurement_key(entry), entry) is not entry:
            raise InputError(f"two latency tables are of {entry.device}: give one of them")
    kept = {measurement_key(entry): entry for entry in bundle.manifest.measured}
    return replace(bundle.manifest, measured=tuple({**kept, **new}.values()))


def _entry(table: Mapping[str, Any], what: str) -> DeviceLatency:
    try:
        ratios = table["split_over_file"] or ()
        data = {
            "device": table["device"],
            "fingerprint": table["fingerprint"],
            "optimization_level": table["settings"]["optimization_level"],
            "exits_us": {layout: list(figures["exits"]) for layout, figures in table["layouts"].items()},
            "split_over_file": [{field.name: ratio[field.name] for field in fields(SplitRatio)} for ratio in ratios],
        }
        table["bundle_sha256"]
        entry: DeviceLatency = typed(DeviceLatency, data, what)
    except (KeyError, TypeError, AttributeError, BundleError) as error:
        raise InputError(f"{what} is none that `latency-table` wrote: {type(error).__name__} {error}") from None
    return entry


def _write(bundle: Bundle, manifest: Manifest, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        work = Path(scratch, "bundle")
        work.mkdir()
        for name in manifest.files:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), work / name)
        write_runtime_archive(work / RUNTIME_FILE)
        written = write_manifest(work, manifest).files
        for name, entry in manifest.files.items():
            if name != RUNTIME_FILE and written[name] != entry:
                # its hash was right when the bundle was opened: a measurement takes minutes
                raise BundleError(f"{bundle.source}: {name!r} was altered since the bundle was opened; copy it again")
        if target.suffix == ".zip":
            pack_zip(work, target)
        else:
            work.rename(target)
