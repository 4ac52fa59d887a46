"""The gate: policy, tests, verdict, and its words."""
