"""Export, tokenizers, scores and training with transformers 5: `make test-transformers5`.

In an environment of its own, which sees the packages of this one and has transformers 5 in front of them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    *(
        "test_architectures.py",
        "test_chat_families.py",
        "test_chat_reference.py",
        "test_custom_generate.py",
        "test_encode.py",
        "test_parity.py",
        "test_reward_model.py",
    ),
    *(
        "test_experts.py",
        "test_families.py",
        "test_lora.py",
        "test_multimodal.py",
        "test_packed.py::test_a_packed_model_is_loaded_as_its_floats",
        "test_tokenizer.py",
        "test_tokenizer_families.py",
        "test_trace_lower.py",
        "test_tracers.py",
        "test_train_packed.py",
        "test_train_learner.py",
    ),
]


@contextlib.contextmanager
def environment(
    extra: str = "export-torch", package: str = "transformers", *options: object
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Its Python, and the variables to start that with.

    extra, package: what it has in front of this one's packages, as pyproject.toml requires it ("": all of the extra);
    options: of pip.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [each for each in project["optional-dependencies"][extra] if each.startswith(package)]
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=True)
        (packages,) = Path(name).glob("lib/python*/site-packages")
        paths = [ROOT, ROOT / "export", ROOT / "runtime", *(path for path in sys.path if "site-packages" in path)]
        (packages / "beside.pth").write_text("\n".join(map(str, paths)), encoding="utf-8")
        python = Path(name, "bin", "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-qq", "install", *options, *wanted]
        subprocess.run(pip, check=True)
        yield python, {**os.environ, "PYTHONPATH": str(packages)}


def main() -> None:
    """Run the tests there. Exits as pytest does."""
    with environment() as (python, variables):
        tests = [ROOT / "tests" / "export" / test for test in TESTS]
        command = [python, "-m", "pytest", "-q", "-m", "not long", *sys.argv[1:], *tests]
        code = subprocess.run(command, cwd=ROOT, env=variables).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()
