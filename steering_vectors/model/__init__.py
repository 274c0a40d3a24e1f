"""Where the layers are, and hooks on them."""
