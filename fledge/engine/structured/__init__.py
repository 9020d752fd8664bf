"""Constrained generation: grammars, JSON schemas and tool calls."""
