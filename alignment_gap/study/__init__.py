"""The controlled study of why online beats offline: stages, arms, analysis, figures and report."""
