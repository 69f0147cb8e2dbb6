"""One file per verb; pure functions that return report objects. No command line, no printing."""
