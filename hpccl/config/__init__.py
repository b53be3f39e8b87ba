"""The configuration of a run: frozen, validated and read from YAML. Never imports torch."""
