"""HTTP server for the engine: the OpenAI API, saved states, and the web page in the folder `web`.

    settings     configuration of a server
    service      the model, the engine, the state store and everything else that outlives a request
    app          the application: routes, error responses, the web page
    middleware   host check, limit of the body size, security headers, count of requests
    auth         API keys, tenants and their limits
    schema       request models and messages for invalid bodies
    errors       errors as an HTTP status and a body
    routes       chat, completions, states, embeddings and the other routes
    prompts      prompts, sampling parameters and constraints of a request
    generation   one generation from its limits to the state that it saves
    concurrency  concurrent requests of a key, and concurrent work of a request
    latency      latency of a generation
    responses    response bodies and server-sent events
    metrics      metrics for Prometheus
    replicas     several replicas of the app on Ray

Text generation is in `fledge.engine`. The command line is in `fledge.cli.commands.serve`.
"""
