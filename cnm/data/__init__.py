"""Datasets: three sources (synthetic, CharadesSTA, ActivityNet) behind one interface."""
