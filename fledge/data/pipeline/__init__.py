"""From raw documents to a token store: the stages of `fledge data build`."""
