"""An OpenAI-compatible server on ``deepseed.inference.Engine``: ``deepseed serve MODEL``.

    cli           the commands: serve, bench serve
    app           routes, keys, limits, errors; nothing here waits for the engine but by ``await``
    protocol      what a request may say, and what it asks of the engine
    connection    one connection: mistakes in HTTP itself, beginnings that do not come
    text          from a request to token ids: templates, limits of the context
    reply         the way back, and what lies unread
    tokens        the bytes of a token, and where it begins in a text
    answers       OpenAI's objects, whole or in chunks
    worker        the one thread that runs the engine
    constrained   outputs that follow a JSON schema, a regex, a list of choices or a grammar
    metrics       Prometheus text under vLLM's names; ``status.html`` shows some of it
    bench         Poisson arrivals against a server, reported under vLLM's field names
"""
