"""References to a user's Python code: names that clash, folders that must not mix, messages a stranger understands."""

from __future__ import annotations

import sys
import textwrap
import types
from pathlib import Path

import pytest

from edgewright.models.sources.python_source import call, load_object


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    return root


USER = {
    "net.py": "from models.net import Net\nfrom export import helper\ndef make(width=3):\n    return Net(width)\n",
    "models/__init__.py": "",
    "models/net.py": "from .parts import SCALE\nclass Net:\n    def __init__(self, w): self.width = w * SCALE\n",
    "models/parts.py": "SCALE = 10\n",
    "models/unused.py": "raise RuntimeError('never imported')\n",
    "export/helper.py": "VALUE = 1\n",
}


def test_a_users_packages_called_models_and_export_are_theirs(tmp_path: Path) -> None:
    root = write(tmp_path, USER)
    loaded = load_object("python:net.py:make", root)
    assert loaded.object().width == 30
    assert loaded.file == root / "net.py"
    names = [path.relative_to(root).as_posix() for path in loaded.sources]
    assert names == ["export/helper.py", "models/__init__.py", "models/net.py", "models/parts.py", "net.py"]
    import edgewright.models

    assert Path(edgewright.models.__file__ or "").parent != root / "models"


def test_a_loaded_module_of_the_same_name_does_not_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = types.ModuleType("models")
    foreign.__path__ = ["/nowhere"]
    monkeypatch.setitem(sys.modules, "models", foreign)
    monkeypatch.setitem(sys.modules, "models.net", types.ModuleType("models.net"))
    assert call("python:net.py:make", {"width": 2}, write(tmp_path, USER)).width == 20


@pytest.mark.parametrize("package", [True, False])
def test_a_package_of_the_same_name_on_the_path_does_not_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: bool
) -> None:
    # as when the command runs inside a repository that has a folder `models` with __init__.py
    other = write(tmp_path / "other", {"models/__init__.py": "", "models/net.py": "class Net: width = None\n"})
    monkeypatch.syspath_prepend(str(other))
    root = write(tmp_path / "user", USER)
    if not package:
        (root / "models/__init__.py").unlink()
    assert load_object("python:net.py:make", root).object(4).width == 40


def test_two_roots_do_not_mix(tmp_path: Path) -> None:
    roots = [
        write(
            tmp_path / name,
            {
                "net.py": "import common\ndef make():\n    import late\n    return (common.NAME, late.NAME)\n",
                "common.py": f"NAME = {name!r}\n",
                "late.py": f"NAME = {name!r}\n",
            },
        )
        for name in "ab"
    ]
    first = load_object("python:net.py:make", roots[0])
    assert load_object("python:net:make", roots[1]).object() == ("b", "b")
    assert call("python:net.py:make", {}, roots[0]) == ("a", "a")
    assert call("python:net.py:make", {}, roots[1]) == ("b", "b")
    assert call("python:net.py:make", {}, roots[0]) == ("a", "a")
    assert load_object("python:net.py:make", roots[0]).object is first.object
    del roots


def test_a_module_missing_in_one_root_is_not_taken_from_another(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"net.py": "import extra\ndef make(): return 1\n", "extra.py": ""})
    b = write(tmp_path / "b", {"net.py": "import extra\ndef make(): return 1\n"})
    load_object("python:net.py:make", a)
    with pytest.raises(ValueError, match=r"the import of 'extra' in .*net.py, line 1 found no such module"):
        load_object("python:net.py:make", b)


def test_files_in_subfolders_import_their_neighbours_and_the_root(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "shared/base.py": "BASE = 5\n",
            "nets/small.py": "import util\nfrom shared.base import BASE\ndef make(): return util.WHO, BASE\n",
            "nets/util.py": "WHO = 'nets'\n",
            "data/mine.py": "import util\nfrom shared.base import BASE\ndef make(): return util.WHO, BASE\n",
            "data/util.py": "WHO = 'data'\n",
            "pkg/__init__.py": "",
            "pkg/sub/__init__.py": "",
            "pkg/sub/net.py": "from ..other import X\nfrom . import near\ndef make(): return X + near.Y\n",
            "pkg/sub/near.py": "Y = 1\n",
            "pkg/other.py": "X = 1\n",
        },
    )
    assert call("python:nets/small.py:make", {}, root) == ("nets", 5)
    assert call("python:data/mine.py:make", {}, root) == ("data", 5)
    assert call("python:nets/small.py:make", {}, root) == ("nets", 5)
    assert call("python:pkg/sub/net.py:make", {}, root) == 2
    assert call("python:pkg.sub.net:make", {}, root) == 2
    names = {path.relative_to(root).as_posix() for path in load_object("python:pkg/sub/net.py:make", root).sources}
    assert names >= {"pkg/other.py", "pkg/sub/near.py", "pkg/sub/__init__.py", "pkg/__init__.py"}


@pytest.mark.parametrize("name", ["my-net.py", "types.py", "json.py", "1.py", "sub/torch.py"])
def test_awkward_file_names(tmp_path: Path, name: str) -> None:
    root = write(tmp_path, {name: "import json\ndef make():\n    return json.dumps([1])\n"})
    assert call(f"python:{name}:make", {}, root) == "[1]"
    import json
    import types as standard

    assert hasattr(json, "dumps") and hasattr(standard, "ModuleType")


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    root = write(tmp_path, {"net.py": "import part\ndef make(): return part.X\n", "part.py": "X = 1\n"})
    assert call("python:net.py:make", {}, root) == 1
    (root / "part.py").write_text("X = 2\n")
    assert call("python:net.py:make", {}, root) == 2
    assert not (root / "__pycache__").exists()


def test_sources_know_imports_that_have_not_run_and_computed_ones(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "net.py": "def make():\n    from parts import late\n    return late\n",
            "parts/late.py": "",
            "dynamic.py": "import importlib\ndef make(n): return importlib.import_module('parts.' + n)\n",
            ".venv/lib/site-packages/torch/__init__.py": "",
        },
    )
    lazy = load_object("python:net.py:make", root).sources
    assert lazy == (root / "net.py", root / "parts/late.py")
    assert load_object("python:dynamic.py:make", root).sources == (root / "dynamic.py", *lazy)


def test_installed_modules_and_nested_attributes(tmp_path: Path) -> None:
    loaded = load_object("python:yaml:SafeLoader.add_implicit_resolver", tmp_path)
    assert loaded.object.__name__ == "add_implicit_resolver"
    assert loaded.file in loaded.sources and {path.parent for path in loaded.sources} == {loaded.file.parent}
    import typing_extensions as single

    assert load_object("python:typing_extensions:IntVar", tmp_path).sources == (Path(single.__file__).resolve(),)


BAD = {
    "good.py": "def make_net(width: int, depth: int = 2): return width\nVALUE = 3\n",
    "broken.py": "def make(:\n    pass\n",
    "missing.py": "import not_a_package_anywhere\n",
    "raises.py": "import helper\n",
    "helper.py": "x = {}['key']\n",
    "leaves.py": "import sys\nsys.exit(3)\n",
}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("python:good.py", "is no reference to Python code"),
        ("good.py:make_net", "is no reference to Python code"),
        ("python:goood.py:make_net", r"there is no file .*goood.py \(did you mean 'good.py'\?\)"),
        ("python:nowhere.net:make", "no module 'nowhere' in the recipe's folder"),
        ("python:good.py:make_nett", r"has no 'make_nett' \(did you mean 'make_net'\?\)"),
        ("python:good.py:VALUE", "'VALUE' is a int, not a function or a class"),
        ("python:broken.py:make", "broken.py, line 1 is not valid Python .*def make"),
        ("python:missing.py:make", "the import of 'not_a_package_anywhere' in .*missing.py, line 1"),
        ("python:raises.py:make", "KeyError while the module was imported in .*helper.py, line 1: 'key'"),
        ("python:leaves.py:make", "ends the program while it is imported in .*leaves.py, line 2"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_object(reference, write(tmp_path, BAD))


def test_the_users_exception_is_chained(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_object("python:raises.py:make", write(tmp_path, BAD))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"widht": 3}, r"has no argument 'widht' \(did you mean 'width'\?\); it takes: width, depth"),
        ({"depth": 3}, "needs the argument 'width'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path: Path, args: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call("python:good.py:make_net", args, write(tmp_path, BAD))


def test_what_the_function_raises_passes(tmp_path: Path) -> None:
    root = write(tmp_path, {"net.py": "def make(): raise LookupError('mine')\n"})
    with pytest.raises(LookupError, match="mine"):
        call("python:net.py:make", {}, root)


FORBIDDEN = "import functools, os, torch\nfrom builtins import eval as net\nfrom torch import load\n" + textwrap.dedent(
    """
    run = functools.partial(os.system, "true")
    class Net(torch.nn.Module):
        @classmethod
        def small(cls): return cls()
    make = functools.partial(Net.small)
    @functools.lru_cache
    def cached(): return Net()
    """
)


@pytest.mark.parametrize(
    "reference",
    ["builtins:eval", "os:system", "subprocess:run", "mine.py:net", "mine.py:os.system", "mine.py:load", "mine.py:run",
     "mine.py:Net.__init_subclass__", "torch:load", "numpy:load", "torch.hub:load"],
)  # fmt: skip
def test_what_is_no_function_of_the_users_is_never_called(tmp_path: Path, reference: str) -> None:
    write(tmp_path, {"mine.py": FORBIDDEN})
    with pytest.raises(ValueError, match=r"no function of yours|module of Python itself|belongs to Python itself"):
        call(f"python:{reference}", {}, tmp_path)


@pytest.mark.parametrize(
    "reference",
    ["mine.py:make", "mine.py:cached", "mine.py:Net.small", pytest.param("torch.nn:Identity", marks=pytest.mark.slow)],
)
def test_functions_and_classes_in_any_wrapping_are_called(tmp_path: Path, reference: str) -> None:
    write(tmp_path, {"mine.py": FORBIDDEN})
    assert hasattr(call(f"python:{reference}", {}, tmp_path), "forward")
