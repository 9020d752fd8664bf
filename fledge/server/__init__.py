"""L5: the engine behind HTTP. OpenAI's protocol, states as things one can keep, and the chat page.

    settings    what a server is started with
    schema      the shape of requests; whatever does not fit is refused with the name of the field
    errors      what goes wrong, as a status and a body
    keys        who asks, and how much they may ask for
    prompts     messages to token ids
    service     the model, the desk, the kept states: everything that outlives a request
    answers     events of the desk as bodies and as server-sent events
    app         the routes

Not here: how text is made (fledge.engine), the command line (fledge.cli.serve).
"""
