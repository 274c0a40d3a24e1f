"""A steered model on the engine that people already serve with."""
