"""Objectives: each a pure function behind one protocol."""
