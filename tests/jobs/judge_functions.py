"""Judges of the tests; jobs name them as judge_functions:NAME."""


def brevity(prompts, responses):
    """A judge of texts: fewer words are better."""
    return [[-len(response.split()) for response in each] for each in responses]


def fewest_tokens(prompt_ids, response_ids):
    """A judge of token ids: fewer are better."""
    return [[-len(response) for response in each] for each in response_ids]
