"""LangChain's client, unchanged: `make test-clients`."""

import openai
import pytest

from mara_runtime import DecodeConfig
from tests.serve.servers import reciting_decoder, serving, table_decoder, user

langchain = pytest.importorskip("langchain_openai", reason="LangChain's client has an environment of its own")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    decoders = {"tiny": table_decoder(folder / "tiny"), "slow": reciting_decoder(folder / "slow", pass_s=0.02)}
    with serving(decoders, conversations=1, queue=0) as running:
        yield running
        assert running.defects == []


def chat(served, model="tiny", **options):
    options = {"max_tokens": 16, "max_retries": 0, **options}
    return langchain.ChatOpenAI(base_url=f"{served.url}/v1", api_key="none", model=model, **options)


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_whole_and_streamed(served, tmp_path, use_responses_api):
    decoder = table_decoder(tmp_path)
    expected = decoder.generate(user("hello"), DecodeConfig(max_new_tokens=16, agents={"other": 1.0}))
    extra_body = {"mara": {"agents": "other"}}
    client = chat(served, use_responses_api=use_responses_api, extra_body=extra_body, stream_usage=True)
    whole, chunks = client.invoke("hello"), [*client.stream("hello")]
    assert whole.text == "".join(chunk.text for chunk in chunks) == expected.text
    counts = [chunk.usage_metadata["output_tokens"] for chunk in (whole, *chunks) if chunk.usage_metadata]
    assert counts == [expected.stats.tokens] * 2


def test_errors_and_going_away(served):
    with pytest.raises(openai.NotFoundError):
        chat(served, "none").invoke("hello")
    with pytest.raises(openai.BadRequestError, match="top_p"):
        chat(served, top_p=2).invoke("hello")
    chunks = chat(served, "slow", max_tokens=150).stream("hello")
    next(chunks)
    with pytest.raises(openai.RateLimitError):
        chat(served, "slow").invoke("hello")
    chunks.close()
    served.until(lambda: served.metric("mara_places_in_use") == 0, seconds=2)
