"""From contrastive texts to a vector."""
