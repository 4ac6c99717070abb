"""Commands: what ``python -m dhf COMMAND`` runs; each module has a ``main(argv) -> exit code`` and imports lazily."""
