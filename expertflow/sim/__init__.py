"""The simulator: the engine's own slots, policies and plan, with a virtual clock."""
