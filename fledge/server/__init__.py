"""L5: the engine behind HTTP. OpenAI's protocol, states as things one can keep, and the chat page.

    settings     what a server is started with
    service      the model, the desk, the kept states: everything that outlives a request
    app          one app of all routes; errors, size limits, names, the page (the folder `page`)
    hosts        by which names a server without keys may be called
    keys         who asks, and how much they may ask for
    access       whose request it is, and which service it is for
    schema       the shape of requests; whatever does not fit is refused with the name of the field
    errors       what goes wrong, as a status and a body
    chat         the route of chats
    completions  the route of texts
    states       the routes of kept states
    plain        the small routes: models, tokens, vectors, health, figures
    prompts      messages to token ids, and what binds the answer
    exchange     one request for text from beginning to end
    reading      texts to ids, the state that a text leaves, how much of one request is done at once
    times        how long an exchange takes
    answers      events of the desk as bodies and as server-sent events
    scores       how probable the tokens of a prompt are
    metrics      figures for Prometheus
    replicas     the same app in several copies, on Ray

Not here: how text is made (fledge.engine), the command line (fledge.cli.commands.serve).
"""
