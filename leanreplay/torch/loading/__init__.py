"""Loaders and samplers that feed a training loop."""
