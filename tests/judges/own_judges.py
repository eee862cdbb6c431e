"""Judges of a user's own, by their names, and judges that are none."""


def brevity(prompts, responses):
    """Texts: the fewer words the better."""
    return [[-len(response.split()) for response in each] for each in responses]


def overlap(prompts, responses):
    """Texts: the share of a response's words that the prompt has."""
    return [
        [sum(word in prompt.split() for word in response.split()) / len(response.split()) for response in each]
        for prompt, each in zip(prompts, responses, strict=True)
    ]


def shortness(prompt_ids, response_ids):
    """Lists of token ids: the fewer the better."""
    assert all(isinstance(token, int) for prompt in prompt_ids for token in prompt)
    return [[-len(response) for response in each] for each in response_ids]


def numbers(prompt_ids, response_ids):
    """Lists of token ids: a number that tells every prompt and response from the others."""
    return [
        [numbered(prompt + response) for response in each]
        for prompt, each in zip(prompt_ids, response_ids, strict=True)
    ]


def numbered(ids):
    return sum(token * place for place, token in enumerate(ids, 1)) % 1009


def flat(prompts, responses):
    """One number a prompt, where each response needs one."""
    return [0.0 for _ in prompts]


def nowhere(prompts, responses):
    """Numbers of which one is none."""
    return [[float("nan") for _ in each] for each in responses]


def strange(question, answer):
    """Parameters of other names."""
    return 0.0


a_number = 3
