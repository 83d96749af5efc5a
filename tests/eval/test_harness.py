"""Bundles as a model of lm-eval, against lm-eval's own model of the same checkpoint in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: `make test-eval` has it")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mara_deploy.demo import MODEL_FOLDER  # noqa: E402
from mara_deploy.evaluate import harness  # noqa: E402
from mara_runtime import AlignedDecoder, DecodeConfig  # noqa: E402
from mara_runtime.errors import OptionError  # noqa: E402
from tests.export.conftest import agent, agent_file, bundle, checkpoint, reference, traced  # noqa: E402

__all__ = ["agent", "agent_file", "bundle", "checkpoint", "reference", "traced"]

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["mara_choice", "mara_text", "mara_answer"]
MAX_CONTEXT = 256


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.chdir(ROOT)  # where the tasks' files are looked for
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def evaluate(model: Any, tasks: list[str], **options: Any) -> tuple[dict, dict]:
    """Metrics and answers of each task, without what differs between runs."""
    manager = TaskManager(include_path=str(ROOT / "tests" / "eval"), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)
    metrics = {
        (task, name): value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }
    answers = {
        (task, sample["doc_id"]): (sample["arguments"], sample["filtered_resps"])
        for task, samples in found["samples"].items()
        for sample in samples
    }
    return metrics, answers


def close(ours: Any, theirs: Any) -> None:
    """Equal, numbers up to rounding."""
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            close(*pair)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-5, abs=1e-3) if isinstance(theirs, float) else theirs)


@pytest.mark.parametrize("name", ["demo", "llama"])
@pytest.mark.parametrize("options", [{}, {"apply_chat_template": True, "num_fewshot": 1}], ids=["text", "chat"])
def test_plain_decoding_is_evaluated_as_hugging_face_s(name, options, bundle, checkpoint, request):
    tasks = TASKS if not options else ["mara_choice", "mara_answer"]
    folder = MODEL_FOLDER if name == "demo" else checkpoint(name)
    theirs = HFLM(str(folder), dtype="float32", device="cpu", batch_size=2, max_length=MAX_CONTEXT)
    ours = harness.BundleModel(str(bundle(name)), align=False, threads=1)
    expected, found = evaluate(theirs, tasks, **options), evaluate(ours, tasks, **options)
    assert found[0].keys() == expected[0].keys()
    assert len(expected[0]) == (5 if not options else 4)
    close(list(found[0].values()), list(expected[0].values()))
    assert found[1].keys() == expected[1].keys()
    for key in expected[1]:
        close(found[1][key], expected[1][key])


def test_aligned_answers_are_the_decoder_s(bundle):
    decoder = AlignedDecoder(bundle("demo"), threads=1)
    for model, options in (
        (harness.BundleModel(decoder), {}),
        (
            harness.BundleModel(decoder, threshold=1e9, agents="demo", fallback="last"),
            {"threshold": 1e9, "fallback": "last"},
        ),
    ):
        _, answers = evaluate(model, ["mara_answer"], apply_chat_template=True)
        for arguments, (text,) in answers.values():
            config = DecodeConfig(max_new_tokens=24, stop=("!", ","), **options)
            ((prompt, _),) = (tuple(each.values()) if isinstance(each, dict) else each for each in arguments)
            assert text == decoder.generate(model.tok_encode(prompt), config).text


def test_a_registered_name_and_what_is_refused(bundle):
    folder = str(bundle("demo"))
    metrics, _ = evaluate("mara-bundle", ["mara_text"], model_args=f"bundle={folder},align=False,threads=1", limit=2)
    assert metrics["mara_text", "word_perplexity,none"] > 1
    model = harness.BundleModel(folder, threads=1)
    with pytest.raises(OptionError, match="aligned decoding has none"):
        evaluate(model, ["mara_choice"])
    with pytest.raises(OptionError, match="do_sample"):
        evaluate(model, ["mara_answer"], gen_kwargs={"do_sample": True, "temperature": 1.0})
    for options, message in (({"device": "cuda"}, "engine=cuda"), ({"beams": 2}, "unknown among beams")):
        with pytest.raises(OptionError, match=message):
            harness.BundleModel(folder, **options)
