"""The peers that run in an environment of their own: their processes, with stand-ins for the libraries they drive."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.bench import protocol

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"

ELSEWHERE = """
import cProfile  # as a library may: the script's folder comes first on the path
import sys

class Blocker:  # that environment has nothing of this project but the protocol
    def find_spec(self, name, path=None, target=None):
        if name.startswith("mara_") and name not in ("mara_deploy", "mara_deploy.bench", "mara_deploy.bench.protocol"):
            raise ImportError(name + " is not installed")

sys.meta_path.insert(0, Blocker())

def chat():
    print("it prints what it likes", flush=True)
"""
GENAI = """
class Config:
    def __init__(self, folder):
        self.overlaid = ""

    def overlay(self, text):
        self.overlaid += text

class Model:
    def __init__(self, config):
        chat()
        assert '"intra_op_num_threads": 2' in config.overlaid, config.overlaid

class GeneratorParams:
    def __init__(self, model):
        pass

    def set_search_options(self, **options):
        self.longest = options["max_length"]

class Generator:
    def __init__(self, model, params):
        self.tokens, self.longest = [], params.longest

    def append_tokens(self, tokens):
        self.tokens += tokens.tolist()
        assert len(self.tokens) <= self.longest

    def generate_next_token(self):
        assert len(self.tokens) < self.longest
        self.tokens.append(0)

    def rewind_to(self, length):
        del self.tokens[length:]

    def token_count(self):
        return len(self.tokens)

class TurnOptions:
    def __init__(self, request):
        self.limit = 0

    def set_do_sample(self, yes):
        assert not yes

    def set_max_generated_tokens(self, count):
        self.limit = count

    def set_min_generated_tokens(self, count):
        assert count == self.limit

class Request:
    def begin_turn(self, tokens, options):
        self.prompt, self.left = tokens.tolist(), options.limit

    def close(self):
        self.engine.requests.remove(self)

class EngineEventFlags:
    TOKEN, FAILED = 1, 2

class Event:
    def __init__(self, request):
        self.request, self.flags = request, EngineEventFlags.TOKEN

class Engine:
    def __init__(self, model):
        self.requests, self.runs = [], 0

    def create_event_buffer(self, capacity):
        return capacity

    def create_request(self):
        request = Request()
        request.engine = self
        self.requests.append(request)
        return request

    def run(self, buffer):  # one more is admitted in each
        assert len({tuple(request.prompt) for request in self.requests}) == len(self.requests) <= buffer
        self.runs += 1
        for request in self.requests[: self.runs]:
            assert request.left > 0
            request.left -= 1
            yield Event(request)
"""
LLAMA = """
import ctypes
from types import SimpleNamespace

llama_token, cache = ctypes.c_int32, []

def __getattr__(name):  # functions whose results do not matter
    if not name.startswith("llama_"):
        raise AttributeError(name)
    return lambda *arguments: SimpleNamespace()

def llama_backend_init():
    chat()

def llama_model_load_from_file(file, params):
    return file.endswith(b"model")

def llama_init_from_model(model, params):
    assert params.n_threads == params.n_threads_batch == 2

def llama_vocab_n_tokens(vocab):
    return 50

def llama_memory_seq_rm(memory, sequence, first, last):
    del cache[first:]

def llama_batch_get_one(tokens, count):
    return list(tokens)[:count]

def llama_decode(context, batch):
    cache.extend(batch)
    return 0

def llama_get_logits_ith(context, row):
    return ctypes.cast((ctypes.c_float * 50)(), ctypes.POINTER(ctypes.c_float))

def llama_print_system_info():
    return b"AVX512 = 1 "
"""


def ask(tmp_path: Path, script: str, model: str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What a peer's process answers: first what it is, then to each request."""
    for module, package, text in (
        ("onnxruntime_genai", "onnxruntime-genai", GENAI),
        ("llama_cpp", "llama-cpp-python", LLAMA),
    ):
        (tmp_path / f"{module}.py").write_text(ELSEWHERE + text)
        metadata = tmp_path / f"{package.replace('-', '_')}-0.1.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "genai_config.json").write_text('{"model": {"vocab_size": 50}}')
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), str(tmp_path / model), "--threads", "2"],
        input="".join(json.dumps(request) + "\n" for request in requests),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == "it prints what it likes\n"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("script", "about"),
    [
        ("genai.py", {"name": "onnxruntime-genai", "versions": {"onnxruntime-genai": "0.1"}, "conversations": 32}),
        ("llamacpp.py", {"name": "llama.cpp", "versions": {"llama-cpp-python": "0.1"}, "system": "AVX512 = 1"}),
    ],
)
def test_a_peer_answers_in_an_environment_without_this_project(
    tmp_path: Path, script: str, about: dict[str, Any]
) -> None:
    decodes = [(4, 3), (4, 2), (9, 5), (1, 1)]
    said, prefilled, memory, failed, *decoded = ask(
        tmp_path,
        script,
        "model",
        {"do": "prefill", "tokens": 700},
        {"do": "memory"},
        {"do": "sing"},
        *({"do": "decode", "context": context, "tokens": tokens} for context, tokens in decodes),
    )
    assert said["versions"].items() >= about["versions"].items()
    assert {**said, "versions": about["versions"]} == about
    assert [len(answer["ms"]) for answer in decoded] == [tokens for _, tokens in decodes]
    assert all(ms > 0 for answer in decoded for ms in answer["ms"])
    assert prefilled["ms"] > 0
    assert memory["peak_bytes"] > 10**6
    assert failed["error"].startswith("AttributeError: ")


def test_genai_decodes_several_conversations_at_once(tmp_path: Path) -> None:
    requests = [
        {"do": "together", "conversations": n, "context": 9, "tokens": tokens} for n, tokens in ((3, 8), (1, 4))
    ]
    _, three, one = ask(tmp_path, "genai.py", "model", *requests)
    assert (three["tokens"], one["tokens"]) == (24, 4)
    assert min(three["ms"], one["ms"]) > 0


def test_a_model_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (said,) = ask(tmp_path, "genai.py", "nowhere", {"do": "memory"})
    assert set(said) == {"error"}
    assert "nowhere" in said["error"]


def test_no_file_hides_another_module() -> None:
    """The folder comes first on a peer's path: with a profile.py in it, nobody could import cProfile."""
    hidden = {"llama_cpp", "onnxruntime_genai", "torch", "transformers", *sys.stdlib_module_names}
    assert {path.stem for path in FOLDER.glob("*.py")} & hidden == set()


def test_prompts_of_different_lengths_share_no_prefix() -> None:
    short, long = protocol.random_tokens(20, 1000), protocol.random_tokens(30, 1000)
    assert (len(short), len(long)) == (20, 30)
    assert short[:3] != long[:3]
    assert short == protocol.random_tokens(20, 1000)
