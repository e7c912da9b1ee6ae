"""Features, metrics, references and reports."""
