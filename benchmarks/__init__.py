"""Measurements of the project against its peers, in the environment that its compute children have; figures in README.md here."""

import os

from infra.settings import COMPUTE_VARIABLES

os.environ.update(COMPUTE_VARIABLES)  # before torch is loaded
