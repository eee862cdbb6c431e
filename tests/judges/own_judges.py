"""A user's own judges, by name, and functions that cannot be judges."""


def brevity(prompts, responses):
    """Texts: fewer words are better."""
    return [[-len(response.split()) for response in each] for each in responses]


def overlap(prompts, responses):
    """Texts: the fraction of a response's words that occur in the prompt."""
    return [
        [sum(word in prompt.split() for word in response.split()) / len(response.split()) for response in each]
        for prompt, each in zip(prompts, responses, strict=True)
    ]


def shortness(prompt_ids, response_ids):
    """Lists of token ids: fewer tokens are better."""
    assert all(isinstance(token, int) for prompt in prompt_ids for token in prompt)
    return [[-len(response) for response in each] for each in response_ids]


def numbers(prompt_ids, response_ids):
    """Lists of token ids: a number that identifies the prompt and the response."""
    return [
        [numbered(prompt + response) for response in each]
        for prompt, each in zip(prompt_ids, response_ids, strict=True)
    ]


def numbered(ids):
    return sum(token * place for place, token in enumerate(ids, 1)) % 1009


def raising(prompts, responses):
    return [[response.lenght for response in each] for each in responses]


def unanswered(prompt_ids, response_ids):
    raise ConnectionError("no\nanswer")


def flat(prompts, responses):
    """One number for each prompt, though each response needs one."""
    return [0.0 for _ in prompts]


def nowhere(prompts, responses):
    """Returns nan instead of numbers."""
    return [[float("nan") for _ in each] for each in responses]


def strange(question, answer):
    """Has parameters with other names."""
    return 0.0


a_number = 3
