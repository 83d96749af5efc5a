"""The parity gate: does an exported bundle compute what Hugging Face eager computes?

Teacher-forced over several prompts and their sibling candidates, in an engine that runs the bundle. A bundle that fails
is not written. Two kinds of evidence are required:

numbers     hidden states, logits, margins: largest difference relative to the largest value, cosine of rows
outcomes    ranks of the next tokens, and each agent's decisions, wherever the reference's own gap exceeds the noise

The noise is measured on each side alone, never between the two sides, else the second check could not fail: it is how
far the same rows move when they are *recomputed* with other pass widths. Reference: the siblings as a batch instead of
one at a time. Engine: the rows of all prompts side by side, one of each in a pass, as several conversations are
decoded; so the KV entries are recomputed, too.

The noise that a bundle records for decoding is larger with int8 and int4, whose kernels round activations to 255
levels. Occasionally a last-bit difference moves a value to the next level, which changes a row about 1000 times as
much. Whether that happens within the few rows of the gate is chance, and it never does on processors whose kernels add
in the same order at every width. So a *perturbed* run changes the KV cache slightly until a level flips in nearly every
row.
These level flips excuse nothing: the gate itself uses the noise of recomputed rows.

    rows.py       Rows, Side, Case: what is computed of a prompt, on one side and on both
    reference.py  Hugging Face's side
    engine.py     the engine's side (needs no torch: two engines are compared on devices, too)
    parts.py      a bundle's graph, whole or in parts, in the engine (structure.py, miniature.py and this need more
                  than devices have)
    compare.py    measures the differences, applies a Gate, and reports

What short prompts and a model's own weights cannot show is the structural gate's (structure.py, miniature.py).
"""

from mara_export.parity.compare import GATES, Gate, Report, compare, compare_agent, gate_of
from mara_export.parity.engine import perturber, run_engine, run_rows
from mara_export.parity.reference import Reference, margins_of, prompts, run_reference
from mara_export.parity.rows import NAMES, SIBLINGS, Case, Rows, Side

__all__ = [
    "GATES",
    "NAMES",
    "SIBLINGS",
    "Case",
    "Gate",
    "Reference",
    "Report",
    "Rows",
    "Side",
    "compare",
    "compare_agent",
    "gate_of",
    "margins_of",
    "perturber",
    "prompts",
    "run_engine",
    "run_reference",
    "run_rows",
]
