"""`fledge bench`: one module per subcommand."""
