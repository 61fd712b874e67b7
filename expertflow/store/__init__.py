"""The slow tier: every expert's bytes, by direct reads from the untouched checkpoint or from RAM."""
