"""Benchmarks with lm-eval's stock tasks: data, engines, sandbox, results."""
