"""Which tokens, what change, and the context in which it holds."""
