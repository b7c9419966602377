"""Rows -> tokens -> forest -> packs. Imports no model and no engine."""
