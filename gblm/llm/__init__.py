"""Causal language models of transformers: load, draw windows, measure perplexity, save."""

from gblm.llm.data import calibration, evaluation
from gblm.llm.evaluate import perplexity
from gblm.llm.models import load, save, windows

__all__ = ["calibration", "evaluation", "load", "perplexity", "save", "windows"]
