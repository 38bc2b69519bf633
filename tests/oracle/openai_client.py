"""The official Python client against a router: models, chat, streaming, completions, seeds, stops, errors.

Usage: python tests/oracle/openai_client.py http://127.0.0.1:8620   (needs `pip install openai`; asserts, prints a
line per check, ends with code 1 at the first that fails)

The same is asked over plain HTTP by tests/processes/api.rs, which needs no Python. This script shows that the
client people use parses the answers: types, iterators and exceptions.
"""

import sys

import openai

OPENING = "Once upon a time there was a poor woodcutter"
QUESTION = [{"role": "user", "content": "Tell me of a wolf."}]


def check(what, holds, shown=""):
    print(f"{'ok' if holds else 'FAILED'}  {what}  {shown}".rstrip())
    if not holds:
        sys.exit(1)


def refused(what, kind, code, call):
    try:
        call()
    except kind as error:
        check(what, error.code == code, f"{type(error).__name__} {error.status_code} {error.code}")
        return
    check(what, False, "was not refused")


def models(client):
    served = client.models.list().data
    check("one model is listed", len(served) == 1, served[0].id)
    check("it can be asked for by name", client.models.retrieve(served[0].id).id == served[0].id)
    return served[0].id


def chat(client, model):
    asked = dict(model=model, messages=QUESTION, temperature=0, max_tokens=32)
    asked["extra_body"] = {"ignore_eos": True}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    check("a chat is answered", whole.usage.completion_tokens == 32, repr(text[:50]))
    check("its end is told", whole.choices[0].finish_reason == "length")
    scores = whole.choices[0].logprobs.content
    check("each token has its log-probability", len(scores) == 32 and all(s.logprob <= 0 for s in scores))
    check("and its alternatives", all(len(s.top_logprobs) == 2 for s in scores))
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    check("the streamed chat is the same", streamed == text, f"{len(chunks)} chunks")
    check("a role comes first", chunks[0].choices[0].delta.role == "assistant")
    check("usage comes last", chunks[-1].usage == whole.usage and not chunks[-1].choices)


def completions(client, model):
    scored = client.completions.create(model=model, prompt=OPENING, max_tokens=0, echo=True, logprobs=1)
    choice = scored.choices[0]
    check("echo gives the prompt back", choice.text == OPENING)
    check("the first token has no score", choice.logprobs.token_logprobs[0] is None)
    lengths = {len(choice.logprobs.token_logprobs), len(choice.logprobs.tokens), scored.usage.prompt_tokens}
    check("every token is scored", len(lengths) == 1, f"{lengths.pop()} tokens")
    several = client.completions.create(model=model, prompt=[OPENING, "The king"], max_tokens=4, n=2)
    check("two prompts, two answers each", [c.index for c in several.choices] == [0, 1, 2, 3])


def seeds_and_stops(client, model):
    def told(**more):
        asked = dict(model=model, prompt=OPENING, max_tokens=32, temperature=0.9) | more
        return client.completions.create(**asked).choices[0]

    first = told(seed=1).text
    check("a seed repeats", told(seed=1).text == first, repr(first[:50]))
    check("another does not", told(seed=2).text != first)
    stop = first[9:14]
    stopped = told(seed=1, stop=["never seen", stop])
    check("a stop string ends the text", stopped.text == first[: first.find(stop)], repr(stop))
    check("and says so", stopped.finish_reason == "stop")


def errors(client, model):
    ask = client.chat.completions.create
    refused("unknown model", openai.NotFoundError, "model_not_found", lambda: ask(model="gpt-4", messages=QUESTION))
    refused(
        "temperature out of range", openai.BadRequestError, "invalid_value",
        lambda: ask(model=model, messages=QUESTION, temperature=3),
    )
    long = [{"role": "user", "content": "wolf " * 200_000}]
    refused(
        "prompt beyond the context", openai.BadRequestError, "context_length_exceeded",
        lambda: ask(model=model, messages=long),
    )
    refused(
        "tools", openai.BadRequestError, "unsupported_parameter",
        lambda: ask(model=model, messages=QUESTION, tools=[{"type": "function", "function": {"name": "f"}}]),
    )


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    client = openai.OpenAI(base_url=sys.argv[1].rstrip("/") + "/v1", api_key="none", max_retries=0, timeout=120)
    model = models(client)
    chat(client, model)
    completions(client, model)
    seeds_and_stops(client, model)
    errors(client, model)
    print(f"all of it holds (openai {openai.__version__})")


if __name__ == "__main__":
    main()
