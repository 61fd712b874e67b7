"""The token scheduler: which sequences share a batch. It decides and executes nothing."""
