"""Judges of the tests; jobs name them as judge_functions:NAME."""


def brevity(prompts, responses):
    """A judge of texts: fewer words are better."""
    return [[-len(response.split()) for response in each] for each in responses]
