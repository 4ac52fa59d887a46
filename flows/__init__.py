"""The story: what happens in which order, the recipes, the deployments table, the command line."""
