"""Pictures and controls."""
