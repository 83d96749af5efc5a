"""The arrows mara_runtime <- mara_export <- mara_deploy, and that the runtime needs nothing heavy."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "runtime" / "mara_runtime"
EXPORT = ROOT / "export" / "mara_export"
OF_OTHERS = ("torch", "transformers", "onnx", "optimum", "safetensors", "huggingface_hub", "tqdm")
HEAVY = (*OF_OTHERS, "mara_export")
COMMANDS = ("run", "inspect", "build", "shared")


def block(names: tuple[str, ...]) -> str:
    return f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
"""


BLOCK = block(HEAVY)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def modules() -> list[str]:
    return sorted("mara_runtime." + ".".join(p.relative_to(RUNTIME).with_suffix("").parts) for p in files(RUNTIME))


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, folder
    return found


def test_the_blocker_blocks() -> None:
    for name in HEAVY:
        out = python(f"{BLOCK}\nimport {name}")
        assert out.returncode != 0
        assert f"{name} is blocked" in out.stderr


def test_every_module_of_the_runtime_imports_without_the_heavy_packages() -> None:
    names = [name.removesuffix(".__init__") for name in modules()]
    assert "mara_runtime.decode" in names
    code = (
        f"{BLOCK}\nimport importlib\nfor name in {names!r}:\n    importlib.import_module(name)\nprint(len(sys.modules))"
    )
    out = python(code)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) > len(names)


def test_every_public_name_resolves() -> None:
    code = "import mara_runtime\nprint([getattr(mara_runtime, name).__name__ for name in mara_runtime.__all__])"
    out = python(BLOCK + code)
    assert out.returncode == 0, out.stderr
    assert ast.literal_eval(out.stdout) == ["AlignedDecoder", "Bundle", "DecodeConfig", "Generation", "MaraError"]
    import mara_runtime

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mara_runtime.nothing


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_runtime_import_without_the_heavy_packages(command: str) -> None:
    out = python(f"{BLOCK}\nimport mara_deploy.commands.{command}")
    assert out.returncode == 0, out.stderr


def test_the_memory_model_needs_nothing_of_the_export_extra() -> None:
    out = python(f"{block(OF_OTHERS)}\nimport mara_deploy.commands.memory")
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("command", ["run", "inspect", "export", "build", "eval"])
def test_help_answers_without_any_heavy_package_and_without_numpy(command: str) -> None:
    # numpy too would be felt: --help answers at once. What an export has to choose from is told by mara_export.targets
    blocked = OF_OTHERS if command == "export" else HEAVY
    code = (
        f"{block(blocked)}\nimport atexit\nfrom mara_deploy.commands.{command} import main\n"
        "atexit.register(lambda: print('LOADED', sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'numpy', 'tokenizers', 'jinja2', 'onnxruntime'})))\nmain(['--help'])"
    )
    out = python(code)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(f"usage: mara-{command} ")
    assert "--debug" in out.stdout
    assert out.stdout.splitlines()[-1] == "LOADED []"


def test_a_bad_option_is_one_line_and_exit_code_2() -> None:
    out = python(
        f"{BLOCK}\nfrom mara_deploy.commands.run import main\nsys.exit(main(sys.argv[1:]))", "bundle", "--top-k", "0"
    )
    assert out.returncode == 2
    assert out.stdout == ""
    assert out.stderr == "mara-run: error: --top-k is 0; it must be a whole number of at least 1\n"


def test_the_package_alone_costs_nothing() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nimport mara_runtime\n"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    out = python(code)
    assert out.returncode == 0, out.stderr
    assert ast.literal_eval(out.stdout) == ["mara_runtime"]


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports anywhere, also inside functions and for type checking alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield (node.module or "").partition(".")[0]


def dynamic_imports(path: Path) -> list[str]:
    """Calls of import_module and __import__ whose target is not plainly in the package itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            target = ast.unparse(node.args[0]).lstrip("f'\"")
            if not target.startswith(f"{path.parent.name}."):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", files(RUNTIME), ids=lambda p: str(p.relative_to(RUNTIME)))
def test_the_runtime_imports_only_what_the_base_install_and_an_engine_bring(path: Path) -> None:
    engines = {"onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda"}
    allowed = {*sys.stdlib_module_names, *engines, "numpy", "tokenizers", "jinja2", "mara_runtime"}
    assert set(imported(path)) - allowed == set()
    assert dynamic_imports(path) == []


@pytest.mark.parametrize("path", files(EXPORT), ids=lambda p: str(p.relative_to(EXPORT)))
def test_the_export_does_not_import_the_front_door(path: Path) -> None:
    assert "mara_deploy" not in set(imported(path))
    assert dynamic_imports(path) == []


def test_the_runtime_opens_onnx_runtime_only_when_an_engine_is_opened() -> None:
    code = "import sys, mara_runtime.engines.ort, mara_runtime.decoder\nprint('onnxruntime' in sys.modules)"
    out = python(code)
    assert (out.returncode, out.stdout) == (0, "False\n"), out.stderr
