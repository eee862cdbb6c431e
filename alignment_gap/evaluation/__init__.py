"""Win rates, KL divergence, classification, and their confidence intervals."""
