"""Pure work: benchmarks, sandbox, statistics, gate. Knows no Prefect, MLflow or S3."""
