"""Constrained generation: grammars, JSON schemas and tool calls. Sampling and HTTP are elsewhere."""
