"""Decisions made visible: traces on the terminal and as a page, and the page that a server shows.

    trace file ─→ reader.py ─┬─→ summary.py ─→ terminal
                             └─→ trace_page.py ──┐
    server's /  ───────────────→ chat_page.py ───┴─→ page.py: template, styles and scripts in one HTML file

tokens.js and tokens.css draw tokens, candidates and verdicts for both pages.
"""
