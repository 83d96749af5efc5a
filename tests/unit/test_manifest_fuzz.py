"""manifest.json: whatever it holds, it is read or refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_runtime.errors import BundleError
from mara_runtime.manifest_reader import parse
from tests.unit.test_manifest import FIELDS, FILE_FIELDS, Path, changed, read_or_refused

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(FIELDS + FILE_FIELDS), json_values)
def test_any_value_anywhere_is_read_or_refused(path: Path, value: object) -> None:
    read_or_refused(json.dumps(changed(path, value)))


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(BundleError):
        parse(text, "here")
