"""Bundles that somebody has made on purpose or keeps otherwise than we do, and workers that are forked."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import small_bundle

from edgewright.edge_runtime import load, open_bundle, pack_zip, verify
from edgewright.edge_runtime.errors import BundleError, EdgewrightError

EDGEWRIGHT = Path(sys.executable).parent / "edgewright"
EVIL = "\x1b[31mred\x1b]0;title\x07\rverified\nrow 7: a"
good = small_bundle.make(Path("good").absolute())


def tell(name, right, what):
    print(f"{'right' if right else 'wrong'} {name}: {' '.join(str(what).split())[:110]!r}", flush=True)


def copy(name):
    return Path(shutil.copytree(good, Path(name).absolute()))


def run(*arguments):
    done = subprocess.run([EDGEWRIGHT, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def refused(name, path, *words):
    """Bad input, in words, from the command line's door."""
    try:
        with open_bundle(path) as bundle:
            load(bundle).close()
        tell(name, False, "opened")
    except BundleError as error:
        tell(name, all(word in str(error) for word in words), error)
    except Exception as error:
        tell(name, False, f"{type(error).__name__}: {error}")


def texts():
    folder = copy("texts")

    def change(data):
        data["name"] = EVIL
        data["answers"][0]["labels"] = [EVIL + label for label in data["answers"][0]["labels"]]
        for exit_ in data["exits"]:
            exit_["name"] = EVIL + str(exit_["index"])
        for point in data["operating_points"]:
            point["name"] += EVIL

    small_bundle.reseal(folder, change)
    for arguments in (
        ("verify", folder),
        ("predict", folder, "x.npy"),
        ("predict", folder, "x.npy", "--operating-point", "none"),
        ("verify", folder, "--thresholds", "7"),
        ("bench", folder, "--min-seconds", "0.01", "--min-samples", "1"),
        ("latency-table", folder, "--blocks", "1", "--block-runs", "1"),
    ):
        said = run(*arguments)[1]
        clean = not any(not c.isprintable() and c != "\n" for c in said) and "\nrow 7" not in said
        tell(f"escapes {' '.join(map(str, (arguments[0], *arguments[2:4])))}", clean and "internal" not in said, said)


def tolerances():
    for field, value in (("torch_abs", 1e300), ("reference_rel", 1e300), ("flip_margin", 1e300), ("torch_abs", 2.0)):
        folder = copy(f"tolerance_{field}_{value:g}")
        small_bundle.reseal(folder, lambda data, f=field, v=value: data["tolerances"].update({f: v}))
        code, said = run("verify", folder)
        caution = [line for line in said.splitlines() if "CAUTION" in line]
        tell(f"tolerance {field} {value:g}", f"{value:g}" in said and bool(caution), caution or said)
    code, said = run("verify", good)
    tell("tolerances of an export", code == 0 and "0.0001" in said and "CAUTION" not in said, said)


def names():
    pack_zip(good, "plain.zip")
    for title, added in {
        "superscript": ["COM¹"], "console": ["CONIN$"], "console with ending": ["conout$.txt"],
        "two forms of an accent": ["é.txt", "e\u0301.txt"], "folders in two cases": ["A/x", "a/y"],
        "nested folders": ["/".join("d" * 2000)], "escape": ["\x1b[2J"], "long": ["n" * 4000],
    }.items():  # fmt: skip
        shutil.copyfile("plain.zip", "odd.zip")
        with zipfile.ZipFile("odd.zip", "a") as archive:
            for name in added:
                archive.writestr(name, b"x")
        refused(f"name in a zip, {title}", "odd.zip", "odd.zip")
    folder = copy("deep")
    for _ in range(60):
        folder = folder / "d"
    folder.mkdir(parents=True)
    refused("nested folders on a disk", "deep", "deep")
    for digits in (21, 400, 5000):
        folder = copy(f"digits{digits}")
        small_bundle.reseal(
            folder, lambda text, n=digits: text.replace('"torch_abs": ', '"torch_abs": ' + "9" * n + ', "_": ')
        )
        refused(f"a number of {digits} digits", folder, "digits")


def swapped():
    for name, do in {
        "in place": lambda path, data: path.write_bytes(data),
        "by another file": lambda path, data: (Path("new").write_bytes(data), Path("new").replace(path)),
    }.items():
        with open_bundle(copy(f"swap_{name.split()[0]}")) as bundle:
            path = bundle.path("model.onnx")
            data = path.read_bytes()
            do(path, data.replace(b"Relu", b"Tanh"))
            for what, use in {"load": load, "verify": verify}.items():
                try:
                    use(bundle)
                    tell(f"swapped {name}, {what}", False, "the other model ran")
                except BundleError as error:
                    tell(f"swapped {name}, {what}", "model.onnx" in str(error), error)
            do(path, data)
            load(bundle).close()


def links():
    store = Path("store").absolute()
    folder = store / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (store / "blobs").mkdir()
    for file in good.iterdir():
        blob = store / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (folder / file.name).symlink_to(Path("../../blobs") / blob.name)
    code, said = run("verify", folder)
    tell("a folder of links", code == 2 and "--follow-links" in said and "zip" in said, said)
    for arguments in (("verify", folder), ("predict", folder, "x.npy")):
        code, said = run(*arguments, "--follow-links")
        tell(f"{arguments[0]} --follow-links", code == 0, said)
    blob = (folder / "model.onnx").resolve()
    blob.write_bytes(blob.read_bytes().replace(b"Relu", b"Tanh"))
    code, said = run("verify", folder, "--follow-links")
    tell("an altered file behind a link", code == 2 and "sha256" in said, said)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("/dev/zero")
    code, said = run("verify", folder, "--follow-links")
    tell("a device behind a link", code == 2 and "model.onnx" in said, said)


FORK = """
import os, sys, signal
import numpy as np
from edgewright import edge_runtime
threads, what = int(sys.argv[2]) or None, sys.argv[3]
x = np.load("x.npy")
runner = edge_runtime.load(sys.argv[1], threads=threads)
runner.predict(x)
if os.fork() == 0:
    signal.alarm(30)
    try:
        if what == "loads its own":
            runner = edge_runtime.load(sys.argv[1], threads=threads)
        print("answers", runner.predict(x).label, flush=True)
    except edge_runtime.EdgewrightError as error:
        print("refuses", error, flush=True)
    sys.exit(0)
code = os.waitstatus_to_exitcode(os.wait()[1])
print("worker ended with", code, "parent answers", runner.predict(x).label)
"""
POOL = """
import multiprocessing, sys
import numpy as np
from edgewright import edge_runtime
x = np.load("x.npy")
runner = edge_runtime.load(sys.argv[1], threads=1)
def work(_):
    return int(runner.predict(x).label[0])
with multiprocessing.get_context("fork").Pool(2) as pool:
    print("worker ended with 0: answers", pool.map(work, range(4)))
"""


def forks():
    pack_zip(good, "forked.zip")
    for source in (good, "forked.zip"):
        for threads in (0, 1, 3):
            for what in ("uses the parent's", "loads its own"):
                name = f"fork, {Path(source).name}, {threads or 'default'} threads, {what}"
                try:
                    done = subprocess.run(
                        [sys.executable, "-c", FORK, source, str(threads), what],
                        capture_output=True, text=True, timeout=60,
                    )  # fmt: skip
                except subprocess.TimeoutExpired:
                    tell(name, False, "hangs")
                    continue
                answered = "answers" in done.stdout.split("worker")[0]
                helped = "refuses" in done.stdout and "load it in the worker" in done.stdout
                ended = "worker ended with 0" in done.stdout
                tell(name, ended and (answered or helped), done.stdout or done.stderr[-200:])
    done = subprocess.run([sys.executable, "-c", POOL, good], capture_output=True, text=True, timeout=60)
    tell("fork, a pool", "worker ended with 0: answers" in done.stdout, done.stdout or done.stderr[-200:])


PEAK = """
import sys
from edgewright.edge_runtime import session_on
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
import onnxruntime
before = peak()
session_on(sys.argv[1], threads=1, thresholds=[float(sys.argv[2])] if len(sys.argv) > 2 else None)
print(peak() - before)
"""


def memory():
    large = small_bundle.make(Path("large").absolute(), width=2800) / "model.onnx"
    size = large.stat().st_size / 1024
    peaks = []
    for more in ((), ("0.3",)):
        done = subprocess.run([sys.executable, "-c", PEAK, large, *more], capture_output=True, text=True, timeout=120)
        peaks.append(int(done.stdout) / size)
    tell(
        "memory of thresholds", peaks[1] < peaks[0] + 0.3,
        f"peak {peaks[0]:.2f} times the file as it is, {peaks[1]:.2f} with thresholds",
    )  # fmt: skip


for case in (texts, tolerances, names, swapped, links, forks, memory):
    try:
        case()
    except (Exception, EdgewrightError) as error:
        tell(case.__name__, False, f"{type(error).__name__}: {error}")
