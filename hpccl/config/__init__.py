"""What a run is: frozen, validated, read from YAML. Never imports torch."""
