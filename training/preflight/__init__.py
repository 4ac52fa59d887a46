"""What is checked on the real first batches before any hour is spent: that the run trains what it says, and that it fits.

Each check has a name and one line: what was seen, or what, where, got, expected, next. All failures are told together. What
needs no model is looked at first (`rows`); what does (`passes`, `room`) is bounded in time by a share of the run that it
precedes. Nothing is changed: no weight, no random state.
"""
