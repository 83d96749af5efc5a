"""An HTTP server of bundles, with the interface of OpenAI's API.

    app.py ── requests.py ──→ worker.py, a thread per bundle ──→ formats.py, responses.py ──→ stream.py
    routes    body → Ask      Ask → pieces of the answer         pieces → OpenAI's objects    server-sent events

It needs the runtime and the extra `serve`, not PyTorch.
"""
