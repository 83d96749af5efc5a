from importlib.metadata import version

from mara_runtime.versions import installed


def test_packages_that_are_not_installed_are_left_out() -> None:
    found = installed("onnxruntime", "no-such-package", "numpy")
    assert list(found.items()) == [("onnxruntime", version("onnxruntime")), ("numpy", version("numpy"))]
    assert installed() == {}
