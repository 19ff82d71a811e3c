"""Images from a model and its VAE: `generation.load(path)` gives a Pipeline, whose `generate` returns PIL images."""

from generation.pipeline import Pipeline as Pipeline
from generation.pipeline import load as load
