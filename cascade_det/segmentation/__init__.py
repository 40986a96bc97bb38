"""Dense prediction: decoder heads, their losses, exits of maps."""
