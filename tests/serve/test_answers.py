"""Answers over HTTP are those of the decoder, whoever shares the passes."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from mara_runtime import DecodeConfig
from tests.serve.servers import CONTEXT, same, serving, table_decoder, texts, user

BASE = DecodeConfig(max_new_tokens=24)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    with serving({"tiny": table_decoder(folder / "tiny")}) as running:
        yield running


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same bundle, decoded by itself."""
    return table_decoder(tmp_path_factory.mktemp("alone") / "tiny")


@pytest.fixture
def client(served):
    with served.openai() as client:
        yield client


def test_models_are_bundles_and_their_agents(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:agent", "tiny:other"]
    assert client.models.retrieve("tiny:other").id == "tiny:other"


MIXED = [
    ("tiny", {}, {}),
    ("tiny:other", {"threshold": 0.25}, {"agents": {"other": 1.0}, "threshold": 0.25}),
    (
        "tiny",
        {"agents": {"agent": 1, "other": 0.5}, "fallback": "last"},
        {"agents": {"agent": 1.0, "other": 0.5}, "fallback": "last"},
    ),
    ("tiny", {"strategy": "random", "top_k": 5}, {"strategy": "random", "top_k": 5, "seed": 7}),
    ("tiny", {"align": False}, {"align": False}),
    ("tiny", {"align": False}, {"align": False, "sample": True, "temperature": 0.7, "seed": 7}),
]


def test_twelve_mixed_requests_at_once_have_the_answers_that_each_gets_alone(served, client, alone):
    asked = []
    for i, (model, extension, options) in enumerate(MIXED * 2):
        config = replace(BASE, **options, max_new_tokens=12 + 3 * i)
        asked.append((i, user(f"prompt {i % 5}"), model, extension, config))

    def ask(i, messages, model, extension, config):
        sampling = {"temperature": config.temperature} if config.sample else {}
        options = {"messages": messages, "model": model, "max_completion_tokens": config.max_new_tokens, **sampling}
        options |= {"seed": config.seed, "extra_body": {"mara": extension}}
        if i % 2:
            chunks = list(
                client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
            )
            return texts(chunks), chunks[-2].choices[0].finish_reason, chunks[-1].usage
        answer = client.chat.completions.create(**options)
        return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda each: ask(*each), asked))
    for (_, messages, _, _, config), answer in zip(asked, found, strict=True):
        same(alone.generate(messages, config), *answer)
    assert served.metric("mara_candidates_examined_total") > 0
    assert served.defects == []


def test_without_a_limit_an_answer_may_fill_the_context(client, alone):
    found = client.chat.completions.create(model="tiny", messages=user("long"))
    same(alone.generate(user("long"), replace(BASE, max_new_tokens=CONTEXT)), *said(found))
    assert found.usage.total_tokens in (CONTEXT, found.usage.prompt_tokens + found.usage.completion_tokens)


def said(answer):
    return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage


def test_the_next_turn_goes_on_in_the_cache(client):
    first = client.chat.completions.create(model="tiny", messages=user("hello"), max_tokens=8)
    turns = [*user("hello"), first.choices[0].message, *user("more")]
    second = client.chat.completions.create(model="tiny", messages=turns, max_tokens=8)
    assert second.usage.prompt_tokens_details.cached_tokens > 0


def test_parts_roles_and_stop_texts(client, alone):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one\ntwo"}]
    whole = alone.generate(plain, BASE)
    stop = whole.text[4:6]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, stop=[stop, "nowhere"])
    same(alone.generate(plain, replace(BASE, stop=(stop, "nowhere"))), *said(answer))


def test_completions_take_text_as_it_is_and_token_ids(client, alone):
    for prompt in ("hello", [5, 6, 7]):
        expected = alone.generate(prompt, replace(BASE, max_new_tokens=16), raw=True)
        answer = client.completions.create(model="tiny", prompt=prompt)
        same(expected, answer.choices[0].text, answer.choices[0].finish_reason, answer.usage)
        chunks = list(client.completions.create(model="tiny", prompt=prompt, stream=True))
        same(expected, "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason)


def test_responses(client, alone):
    turns = [*user("hi"), {"role": "assistant", "content": "ho"}, *user("hello")]
    options = {"model": "tiny", "instructions": "be brief", "input": turns, "max_output_tokens": 20}
    expected = alone.generate([{"role": "system", "content": "be brief"}, *turns], replace(BASE, max_new_tokens=20))
    answer = client.responses.create(**options)
    assert answer.output_text == expected.text
    status = "completed" if expected.finish_reason == "stop" else "incomplete"
    assert (answer.status, answer.usage.output_tokens) == (status, expected.stats.tokens)
    with client.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response() if status == "completed" else None
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-1] == f"response.{status}"
    assert final is None or final.output_text == expected.text
    repeated = client.responses.create(
        model="tiny", input=[*user("a"), *answer.output, *user("b")], max_output_tokens=4
    )
    assert repeated.usage.output_tokens <= 4


def test_log_probabilities_are_those_of_the_language_model(client, alone):
    steps = [piece.step for piece in alone.stream(user("hello"), replace(BASE, max_new_tokens=6))]
    answer = client.chat.completions.create(
        model="tiny", messages=user("hello"), max_tokens=6, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs.content
    assert [each.logprob for each in found] == [s.candidates.log_probabilities[s.rank - 1] for s in steps]
    assert [[t.logprob for t in each.top_logprobs] for each in found] == [
        s.candidates.log_probabilities[:3].tolist() for s in steps
    ]
    raw = client.completions.create(model="tiny", prompt="hello", max_tokens=6, logprobs=2).choices[0].logprobs
    assert len(raw.tokens) == len(raw.token_logprobs) == len(raw.text_offset) == 6
    response = client.responses.create(
        model="tiny", input="hello", max_output_tokens=6, top_logprobs=3, include=["message.output_text.logprobs"]
    )
    assert [each.logprob for each in response.output[0].content[0].logprobs] == [each.logprob for each in found]


@pytest.mark.parametrize("stream", [False, True])
def test_decisions_and_counters_on_request(client, alone, stream):
    pieces = list(alone.stream(user("hello"), BASE))
    options = {"model": "tiny", "messages": user("hello"), "max_tokens": 24}
    options["extra_body"] = {"mara": {"decisions": True}}
    if stream:
        chunks = [
            chunk.mara for chunk in client.chat.completions.create(**options, stream=True) if hasattr(chunk, "mara")
        ]
        decisions = [each for chunk in chunks for each in chunk.get("decisions", [])]
        counters = chunks[-1]["stats"]
    else:
        found = client.chat.completions.create(**options).mara
        decisions, counters = found["decisions"], found["stats"]
    assert [each["token"] for each in decisions] == pieces[-1].result.token_ids
    assert [each["rank"] for each in decisions] == [piece.step.rank for piece in pieces]
    expected = pieces[-1].result.stats.algorithm()
    assert {name: counters[name] for name in expected} == expected


def test_the_example_of_the_guide(tmp_path, alone, capsys):
    page = (Path(__file__).resolve().parents[2] / "docs/guide/serve.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    with serving({"qwen2-aligned": table_decoder(tmp_path)}) as running:
        exec(example.replace("http://127.0.0.1:8000", running.url), {})
    expected = alone.generate(user("How do I keep bread fresh?"), replace(BASE, max_new_tokens=CONTEXT))
    assert capsys.readouterr().out == expected.text
