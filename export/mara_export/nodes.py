"""Names of the custom nodes that tracing makes and lowering takes; trace.py says what each computes.

Apart from both, as whoever makes a graph without tracing one needs neither Optimum nor PyTorch.
"""

DOMAIN, NODE, ROTARY, NORM = "mara", "CachedAttention", "Rotary", "RMSNorm"
