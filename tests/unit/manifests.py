"""Valid manifests, as the JSON values that docs/reference/bundle.md specifies."""

import hashlib
from pathlib import PurePosixPath
from typing import Any

from mara_runtime.manifest import SCHEMA_VERSION


def manifest_json(
    files: dict[str, bytes], *, has_tokenizer: bool = False, special_tokens: dict[str, str] | None = None
) -> dict[str, Any]:
    """A valid manifest of these files."""
    tokenizer = {
        "file": "tokenizer.json",
        "chat_template": "chat_template.jinja" if "chat_template.jinja" in files else None,
        "special_tokens": special_tokens or {},
        "message_rules": [],
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "source": "example/tiny",
            "revision": "0123abc",
            "adapter": None,
            "architecture": "qwen2",
            "tested": True,
            "shape": {
                "hidden_size": 2,
                "vocab_size": 12,
                "num_layers": 1,
                "num_heads": 2,
                "caches": [{"count": 1, "kv_heads": 1, "head_dim": 4}],
            },
            "intermediate_size": 128,
            "experts": 0,
            "tied": True,
            "eos_token_ids": [0],
            "weights": "0123",
            "ignored_weights": [],
        },
        "agents": [agent_json(PurePosixPath(name).stem) for name in files if name.startswith("agents/")],
        "max_context": 32,
        "max_candidates": 8,
        "targets": ["cpu"],
        "step": {
            "file": "step.onnx",
            "lowering": "ort",
            "precision": "int4",
            "quantisation": {"bits": 4, "block_size": 32, "quantiser": "rtn", "keep": []},
            "cache": "float32",
        },
        "engines": [],
        "tokenizer": tokenizer if has_tokenizer else None,
        "made_with": {"mara-deploy": "0.1.0"},
        "parity": parity_json(),
        "structure": {"layers": 2, "windows": [0, 16], **parity_json()},
        "noise": 0.0025,
        "files": {
            name: {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }


def agent_json(name: str, **facts: Any) -> dict[str, Any]:
    """A valid entry of `agents`; its file must be among the manifest's."""
    return {
        "name": name,
        "file": f"agents/{name}.safetensors",
        "source": f"{name}.pth",
        "hidden_size": 2,
        "widths": [3, 2],
        "fallback": "first",
        "state": "final",
        "training": None,
        "parity": agent_parity_json(),
        "noise": 0.001,
        **facts,
    }


_COUNTS = {"compared": 39, "within_noise": 1, "differing": 0, "changed": 1}


def parity_json() -> dict[str, Any]:
    """A report of the parity gate."""
    number = {"greatest_difference": 0.001, "least_cosine": 0.99}
    return {
        "passed": True,
        "prompts": 2,
        "rows": 40,
        "rerouted": 0.0,
        "largest_activation": 900.5,
        **{name: dict(number) for name in ("hidden", "logits")},
        "noise": {"hidden": 0.1, "logits": 0.2},
        **{name: dict(_COUNTS) for name in ("first", "ranks")},
        "min_gap": {"first": 0.1, "ranks": 0.2},
        "perplexity": {"reference": 12.5, "exported": 12.25},
        "parts": 1,
    }


def agent_parity_json() -> dict[str, Any]:
    """A report of an agent's parity gate."""
    return {
        "passed": True,
        "prompts": 2,
        "rows": 40,
        "rerouted": 0.5,
        "margins": {"greatest_difference": 0.001},
        "noise": {"margins": 0.3},
        "decisions": dict(_COUNTS),
        "min_gap": {"decisions": 0.3},
    }


def engine_json(file: str, **facts: Any) -> dict[str, Any]:
    """A valid entry of `engines`; its file must be among the manifest's."""
    return {
        "target": "tensorrt",
        "file": file,
        "slots": 64,
        "decode_rows": 26,
        "prefill_rows": 64,
        "head_rows": 17,
        "places": 4,
        "shared_rows": 32,
        "agents": 2,
        "agent_widths": [8, 4],
        "in_place": True,
        "version": "10.16.1.11",
        "compute_capability": "8.7",
        "platform": "linux-aarch64",
        "options": {"decomposable": "all"},
        **facts,
    }
