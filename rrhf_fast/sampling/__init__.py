"""Decoding policies: how the responses that RRHF ranks are drawn from a model."""
