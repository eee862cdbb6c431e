"""Judges of the tests' own, which jobs name as judge_functions:NAME."""


def brevity(prompts, responses):
    """The fewer words, the better; over texts."""
    return [[-len(response.split()) for response in each] for each in responses]
