"""The models, and the layers they share."""
