"""Documents, figures, statistics and terminal output that analyses, experiments, evaluations and cost tables share."""
