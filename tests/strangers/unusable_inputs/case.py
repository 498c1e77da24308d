"""Recipes and folders that cannot work: each refused before anything is computed, exit code 2, with the true reason."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from edgewright.pipeline import run
from edgewright.pipeline.errors import EdgewrightError
from edgewright.pipeline.recipe.recipe import load_recipe

warnings.filterwarnings("ignore")
RECIPE = """model: {{name: "python:net.py:{model}", args: {args}}}
task: "python:net.py:{task}"
stages: [{{name: train, epochs: 1}}, {more}]
export: {{simplify: none}}
benchmark: {{enabled: false}}
threads: 1
"""


def tried(name, *words, overrides=(), place=None, out="out", **changes):
    folder = Path(place or ".")
    values = {"model": "net", "args": "{}", "task": "task", "more": "train", **changes}
    (folder / "recipe.yaml").write_text(RECIPE.format(**values))
    try:
        run(load_recipe(folder / "recipe.yaml", overrides), out)
        code, said = 0, "went through"
    except EdgewrightError as error:
        code, said = error.exit_code, str(error)
    except Exception as error:
        code, said = 1, f"{type(error).__name__}: {error}"
    stored = list(Path(os.fsdecode(os.fsencode(out)), "checkpoints").glob("*"))
    right = code == 2 and not stored and all(word in said for word in words)
    text = f"exit code {code}, {said[:140]}".encode("ascii", "backslashreplace").decode()
    print("right" if right else "wrong", f"{name}: {text}", flush=True)


def full_disk():
    """Needs the right to mount; says nothing without it."""
    place = Path("small").absolute()
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], capture_output=True).returncode:
        return
    try:
        (place / "fill").write_bytes(bytes(12288))
        values = {"model": "net", "args": "{}", "task": "task", "more": ""}
        Path("recipe.yaml").write_text(RECIPE.format(**values).replace("simplify: none", "simplify: onnxscript"))
        done = subprocess.run(
            [str(Path(sys.executable).parent / "edgewright"), "run", "recipe.yaml", "--out", "full"],
            env={**os.environ, "TMPDIR": str(place)}, capture_output=True, text=True,
        )  # fmt: skip
        kept = len(list(Path("full/checkpoints").glob("0*")))
        right = done.returncode == 2 and str(place) in done.stderr and kept == 2
        print(
            "right" if right else "wrong", f"full_temporary_folder: exit code {done.returncode}, {done.stderr[-160:]!r}"
        )
    finally:
        subprocess.run(["umount", str(place)], capture_output=True)


tried("nan_in_args", "model.args.width", "NaN", args="{width: .nan}")
tried("infinite_in_a_list", "model.args.width.1", args="{width: [1, .inf]}")
tried("beyond_float64", "stages.0.learning_rate", overrides=["stages.0.learning_rate=1e999"])
tried("text_that_becomes_nan", "learning_rate", overrides=["stages.0.learning_rate=NaN"])
tried("huge_integer", "model.args.width", args="{width: 1" + "0" * 400 + "}")
tried("builtin", "builtins", overrides=["model.name=python:builtins:eval", "model.args.source=open('ran','w')"])
tried("imported_builtin", "builtins.eval", model="evil", args="{}")
tried("system", "posix", model="os.system", args="{command: touch ran}")
tried("system_as_task", "posix", task="os.system")
tried("pickle_reader", "torch", overrides=["model.name=python:torch:load"])
tried("same_label_twice", "'cat' twice", task="twice")
tried("scripted_part", "TorchScript", "'0'", model="scripted")
tried("traced_part", "TorchScript", model="traced")
print("wrong" if Path("ran").exists() else "right", "nothing_was_run: no file of a refused function")
odd = Path(os.fsdecode(b"caf\xe9"))
odd.mkdir()
shutil.copy("net.py", odd)
tried("path_of_the_recipe", "UTF-8", place=odd)
tried("path_of_the_results", "UTF-8", out=odd / "out")
full_disk()
