"""The paper's tables and figures, each beside what the paper reports: `python -m benchmarks.paper`.

A module for each table or figure, with an `Item` for each way in which it is made (counted, simulated, measured);
`items.py` lists them. `results.py` runs and keeps them, `page.py` writes docs/results.md of what was kept.
"""
