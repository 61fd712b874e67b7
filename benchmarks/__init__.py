"""Benchmarks: `python -m benchmarks.NAME`. They print a table and, last, one JSON object; they never gate."""
