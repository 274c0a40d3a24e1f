"""What a vector does, in texts and numbers."""
