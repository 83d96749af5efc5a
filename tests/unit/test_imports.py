"""Structure: arrows mara_runtime <- mara_export <- mara_deploy, no circles, and a runtime without heavy packages."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from tests.house import PACKAGES, House, tree

ROOT = Path(__file__).resolve().parents[2]
HOUSE = House(ROOT)
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
HEAVY = ("torch", "transformers", "onnx", "optimum", "huggingface_hub", "tqdm")
ENGINES = {"onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda"}
BASE = {"numpy", "safetensors", "tokenizers", "jinja2"}
ALLOWED = {*sys.stdlib_module_names, *ENGINES, *BASE, "cryptography", "mara_runtime"}
"""What the runtime may import: the base install, the engines' packages, and one to check signatures."""
MOST_LINES = 350

BLOCK = """
import importlib.abc, importlib, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
loaded = lambda: {name.partition(".")[0] for name in sys.modules}
found = {}
for name in BLOCKED:
    try:
        importlib.import_module(name)
    except ImportError as error:
        found.setdefault("blocked", []).append(name)
"""


def without(blocked: tuple[str, ...], code: str) -> dict[str, object]:
    """Run code where packages cannot be imported; returns what it puts into `found`."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))
    done = subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {blocked!r}\n{BLOCK}\n{code}\nprint(json.dumps(found))"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("blocked") == list(blocked)
    return found


def test_the_runtime_works_without_the_heavy_packages():
    modules = [name for name in HOUSE.modules if name.startswith("mara_runtime")]
    code = f"""
before = loaded()
import mara_runtime
found["package alone"] = sorted(loaded() - before - set(sys.stdlib_module_names))
for name in {modules}:
    importlib.import_module(name)
found["public"] = [getattr(mara_runtime, name).__name__ for name in mara_runtime.__all__]
for name in ("run", "inspect", "serve"):
    importlib.import_module("mara_deploy.commands." + name)
importlib.import_module("mara_deploy.serve.http")
found["engines"] = sorted(loaded() & {ENGINES!r})
from mara_deploy.commands.run import main
found["refused"] = main(["bundle", "--top-k", "0"])
"""
    assert without((*HEAVY, "mara_export"), code) == {
        "package alone": ["mara_runtime"],
        "public": ["AlignedDecoder", "Bundle", "DecodeConfig", "Generation", "MaraError", "Piece"],
        "engines": [],  # imported when one is opened
        "refused": 2,
    }


def test_help_is_instant():
    """Without any heavy package, and without NumPy, which would be felt, too."""
    code = f"""
import contextlib, io
slow = {{"onnxruntime", *{BASE!r}}}
for script, entry in {SCRIPTS!r}.items():
    shown = io.StringIO()
    module, _, function = entry.partition(":")
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        getattr(importlib.import_module(module), function)(["--help"])
    found[script] = [shown.getvalue().split()[:2], sorted(loaded() & slow)]
"""
    assert without(HEAVY, code) == {script: [["usage:", script], []] for script in SCRIPTS}


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_one_way(package):
    later = [*PACKAGES][[*PACKAGES].index(package) + 1 :]
    for module, path in HOUSE.modules.items():
        if module.partition(".")[0] == package:
            for target, line in HOUSE.imports(module):
                top = target.partition(".")[0]
                assert top not in later, f"{path}:{line} imports {target}"
                assert package != "mara_runtime" or top in ALLOWED, f"{path}:{line} imports {target}"


def test_what_is_imported_by_name_is_in_the_same_package():
    for module, path in HOUSE.modules.items():
        package = module.partition(".")[0]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                assert package == "mara_deploy" or ast.unparse(node.args[0]).lstrip("f'\"").startswith(f"{package}.")


def test_no_circles_and_no_class_name_for_two_things():
    assert HOUSE.circle() == []
    assert HOUSE.repeated_classes() == {}


def test_no_file_is_too_long_to_read():
    assert {file: lines for file, lines in HOUSE.lines.items() if lines > MOST_LINES} == {}
