"""The controlled study: why does online beat offline? Stages, arms, analysis, figures and report."""
