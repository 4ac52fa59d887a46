"""Reward models: how they read a response and what they give it."""
