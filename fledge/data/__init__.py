"""L2: documents in, token stores out. Knows nothing of models.

`documents` reads text with its language, `mixture` decides how much of which and keeps some aside for validation,
`tokens` holds the token ids of a corpus in one flat file and cuts training windows out of it.
"""
