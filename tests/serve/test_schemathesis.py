"""Requests that schemathesis makes of the OpenAPI document: `make test-clients`."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from mara_deploy.serve.keys import Keys
from tests.serve.servers import serving, table_decoder

pytest.importorskip("schemathesis", reason="schemathesis has an environment of its own")
COMMAND = "from schemathesis.cli import schemathesis; schemathesis()"
# Where a document cannot say all that a request must be: the last message has text, agents are those of the model.
UNSAID = "positive_data_acceptance"


@pytest.mark.parametrize("examples", [30, pytest.param(1000, marks=pytest.mark.long)])
def test_schemathesis_finds_nothing(tmp_path, examples):
    with serving({"tiny": table_decoder(tmp_path / "tiny")}, keys=Keys(["secret"]), max_body_mib=1) as running:
        options = ["--checks", "all", "--exclude-checks", UNSAID, "--seed", "1", "--max-examples", str(examples)]
        options += ["--header", "Authorization: Bearer secret", "--no-color"]
        command = [sys.executable, "-c", COMMAND, "run", f"{running.url}/openapi.json", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"Selected: (\d+)/\1\n", done.stdout)  # no path is left out
        running.until(lambda: (running.metric("mara_places_in_use"), running.metric("mara_queue")) == (0, 0))
        assert running.defects == []
        seen = Counter((line["path"], line["status"]) for line in running.lines)
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
            assert seen[path, 200] > 2, "it answers none, and the check says little"
            assert seen[path, 400] > 50
