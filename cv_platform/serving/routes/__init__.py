"""The routes, one module for each group of them, and the shapes of their JSON."""
