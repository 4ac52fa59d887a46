"""The report, the comparison's page and the model card, and their templates."""
