"""The image classifier's service."""
