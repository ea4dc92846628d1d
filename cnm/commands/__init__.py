"""The commands of ``cnm``, a module each; ``cnm.cli`` gathers them."""
