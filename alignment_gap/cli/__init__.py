"""The alignment-gap command."""
