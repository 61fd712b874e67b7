"""Token scheduling: which sequences share a batch, and moving what they carry from one batch to another."""
