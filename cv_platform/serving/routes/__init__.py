"""The routes, one module for each group of them; what they are made of is in `parts`."""
