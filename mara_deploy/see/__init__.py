"""Decisions made visible: traces on the terminal and as a page.

    trace file ─→ reader.py ─┬─→ summary.py ─→ terminal
                             └─→ trace_page.py ─→ page.py: template, styles and scripts in one HTML file

tokens.js and tokens.css draw tokens, candidates and verdicts.
"""
