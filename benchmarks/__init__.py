"""Side-by-side measurements of the ops against the strongest things PyTorch offers; see README.md."""
