"""One Prefect task a step: fingerprint, found?, work, commit, record."""
