"""Small weights committed with the package, for the digits default."""
