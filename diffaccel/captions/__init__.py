"""Captions of images as conditions: where they come from, encoders of texts, and their cached embeddings."""
