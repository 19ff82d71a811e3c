"""Scores of generated and reconstructed images, and what they are compared with."""
