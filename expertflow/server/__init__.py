"""OpenAI-compatible HTTP over an engine, with metrics and a live view of the cache."""
