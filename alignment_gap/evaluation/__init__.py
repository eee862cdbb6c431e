"""Win rates, divergence, classification, and the intervals that go with them."""
