"""What is shown of the errors of others."""

from mara_runtime.errors import first_line


def test_one_line_of_an_error():
    assert first_line(ValueError("\n  what is wrong\nand a page about it")) == "what is wrong"
    assert first_line(EOFError()) == "EOFError"
    assert first_line(RuntimeError("Error in loading:\n\n\tsizes differ\nand more")) == "Error in loading: sizes differ"
    assert first_line(RuntimeError("Error in loading:\n")) == "Error in loading:"
