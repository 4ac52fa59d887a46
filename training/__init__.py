"""Pure work on rows and tensors, run as a child process. Knows torch; no Prefect, MLflow or S3."""
