"""What is shown of other libraries' errors."""

import pytest

from mara_runtime.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  what is wrong\nand a page about it"), "what is wrong"),
        (EOFError(), "EOFError"),
        (RuntimeError("Error in loading:\n\n\tsizes differ\nand more"), "Error in loading: sizes differ"),
        (RuntimeError("Error in loading:\n"), "Error in loading:"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line
