"""Adapters to the outside: settings, store (S3), tracking (MLflow), the local stack. Imports nothing else of ours."""
